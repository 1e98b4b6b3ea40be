"""Images as data URIs: our endpoint, which gives vLLM the features of training, beside vLLM's server and its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import openai
import pytest
from safetensors.torch import load_file, save_file

from rayswift.models.loading import load_tokenizer
from tests import vllm_cases
from tests.multimodal_models import make_for_vllm
from tests.serving_media_cases import image_part, picture, png, text_part
from tests.vllm_cases import Pair, both

pytestmark = vllm_cases.MARKS
_ONE, _TWO = image_part(png(picture(1))), image_part(png(picture(2, 70, 90)))
_JPEG = image_part(png(picture(3, 64, 64), "JPEG"), "image/jpeg")
_QUESTIONS = {
    "one": [_ONE, text_part("What is it?")],
    "behind the text": [text_part("a"), _TWO],
    "two": [_ONE, text_part(" and "), _TWO, text_part("What is it?")],
    "jpeg": [_JPEG, text_part("What is it?")],
    "none": [text_part("Who are they? A digit.")],
}


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory,
    free_port: Callable[[], int],
    serving_ray: Callable[[], AbstractContextManager[int]],
) -> Iterator[Pair]:
    root = tmp_path_factory.mktemp("eyes")
    folder = make_for_vllm("qwen2_5_vl", root / "m")
    _make_sure_of_itself(folder)
    # the largest image that there may be takes a CPU minutes to try out
    options = ("--limit-mm-per-prompt", '{"image": 2, "video": 0}', "--skip-mm-profiling")
    with vllm_cases.pair_over(folder, root / "log", free_port(), serving_ray, 512, options, max_media=2) as made:
        yield made


def _make_sure_of_itself(folder: Path) -> None:
    """Random weights find every token about as likely, those among them that are no text, or half a character."""
    tokenizer, weights = load_tokenizer(str(folder)), load_file(folder / "model.safetensors")
    head_VD = weights["lm_head.weight"]
    for number in range(len(head_VD)):
        text = tokenizer.decode([number], skip_special_tokens=True)
        head_VD[number] *= 20 if text and "\ufffd" not in text else 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _ask(client: openai.OpenAI, parts: Any) -> Any:
    return client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": parts}], temperature=0, max_tokens=8, logprobs=True,
        top_logprobs=2,
    )  # fmt: skip


@pytest.mark.parametrize("parts", _QUESTIONS.values(), ids=_QUESTIONS)
def test_questions_about_images_are_answered_alike(pair: Pair, parts: Any) -> None:
    def ask(client: openai.OpenAI) -> Any:
        reply = _ask(client, parts)
        (choice,) = reply.choices
        stream = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": parts}], temperature=0, max_tokens=8, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == choice.message.content
        return choice.message.content, choice.finish_reason, reply.usage.prompt_tokens, reply.usage.completion_tokens

    assert both(pair, ask)[0]
    ours, theirs = (_ask(client, parts).choices[0].logprobs.content for client in pair)
    # Training's processor is Pillow's and theirs torchvision's, which round a resized pixel in another way.
    bound = 1e-2 if any(part["type"] == "image_url" for part in parts) else 1e-4
    assert [one.logprob for one in ours] == pytest.approx([one.logprob for one in theirs], abs=bound)
    assert [one.token for one in ours] == [one.token for one in theirs]


def test_the_image_matters(pair: Pair) -> None:
    """Else everything above would hold for servers that look at nothing."""
    shown = [[_ONE, text_part("What is it?")], [image_part(png(picture(9))), text_part("What is it?")]]
    for client in pair:
        first, other = (_ask(client, parts).choices[0].logprobs.content[0].logprob for parts in shown)
        assert abs(first - other) > 5e-2


def test_what_cannot_be_decoded_and_too_many_are_refused_alike(pair: Pair) -> None:
    for parts in ([image_part(png(picture(1))[:200])], [image_part(b"no image")], [_ONE, _ONE, _ONE]):
        for client in pair:
            with pytest.raises(openai.BadRequestError):
                _ask(client, parts)
