"""Images in the real vLLM behind the endpoint: prompts are those of training, log-probabilities transformers'."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from safetensors.torch import load_file

from rayswift.config.job import ModelSpec
from rayswift.data.types import NUM_PLACEHOLDERS
from rayswift.export.pipeline import export
from rayswift.export.terms import QuantizeSpec
from rayswift.models.adapters import load_base
from rayswift.models.loading import load_model, load_tokenizer
from rayswift.planning.parts import part_of
from rayswift.serving import environment
from rayswift.serving.app import RunningEndpoint, serve_in_background
from rayswift.serving.prompts import PromptBuilder
from rayswift.serving.spec import ServeSpec
from rayswift.training.media import load_encoder
from tests.export_cases import shake, write_run
from tests.multimodal_models import make_for_vllm
from tests.serving_media_cases import asked, image_part, picture, png, text_part

_FOUND = environment.interpreter_of("vllm", None)
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.long,
    pytest.mark.ray,
    pytest.mark.skipif(_FOUND.problem is not None, reason=f"no serving environment: {_FOUND.problem}"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept"),  # processors asked directly
]
_FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl")
_NUM_TOKENS = 6
_ONE, _TWO = image_part(png(picture(1))), image_part(png(picture(2, 70, 90)))
_QUESTIONS = (
    [_ONE, text_part("What is it?")],
    [text_part("a"), _TWO],
    [_ONE, text_part(" and "), _TWO, text_part("What is it?")],
    [text_part("Who are they? A digit.")],
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each family."""
    root = tmp_path_factory.mktemp("eyes")
    made = {name: make_for_vllm(name, root / name) for name in _FAMILIES}
    config = json.loads((made["llava"] / "config.json").read_text())  # the last layer but one, as LLaVA-1.5's
    (made["llava"] / "config.json").write_text(json.dumps(config | {"vision_feature_layer": -2}))
    return made


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts to calibrate on and to be judged by."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"What is in the picture? {i} of {3 * i}"}) + "\n" for i in range(24)))
    return file


@pytest.mark.parametrize(
    ("family", "quantizer"),
    [("llava", None), ("llava", "int8"), ("qwen2_5_vl", None), ("qwen2_5_vl", "int8"), ("qwen3_vl", "fp8")],
)
def test_an_export_is_proved_in_vllm_with_an_image_too(
    folders: dict[str, Path], rows: Path, tmp_path: Path, family: str, quantizer: str | None
) -> None:
    weights = load_base(str(folders[family])).state_dict()
    shake(weights, 0.1)  # random ones of transformers find every token about as likely
    write_run(tmp_path / "run", folders[family], weights, None)
    spec = quantizer and QuantizeSpec(name=quantizer, calibration=str(rows), num_calibration=12, num_held_out=6,
                                      max_length=64, max_perplexity=1.5, min_agreement=0.5)  # fmt: skip
    manifest = export(str(tmp_path / "run"), str(tmp_path / "out"), quantize=spec or None, engine="vllm")
    verify = manifest.verify
    assert verify is not None
    assert verify.media == ("image",)
    said = verify.served
    assert said is not None
    assert said.num_positions == verify.num_positions - verify.num_prompts
    assert (said.media_equal, said.template_equal) == (True, True)
    assert said.mean_abs <= (1e-5 if quantizer is None else said.bound_mean_abs)
    if quantizer is None:
        assert said.greedy_agreement == 1.0
    else:
        tower = {
            t.dtype for name, t in load_file(tmp_path / "out/model.safetensors").items() if part_of(name) == "vision"
        }
        assert tower == {torch.bfloat16}


@pytest.fixture(scope="module")
def endpoint(
    folders: dict[str, Path], serving_ray: Callable[[], AbstractContextManager[int]]
) -> Iterator[RunningEndpoint]:
    with serving_ray() as port:
        spec = ServeSpec(
            models={name: str(folder) for name, folder in folders.items()}, port=port, max_concurrency=4, max_media=2,
            max_media_pixels=20_000, max_model_len=512, kv_cache_bytes=2**27,
        )  # fmt: skip
        assert environment.resolved(spec)[0].engine == "vllm"
        with serve_in_background(spec) as running:
            yield running


def _ask(url: str, model: str, parts: Any) -> Any:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        return client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": parts}], temperature=0, max_tokens=_NUM_TOKENS,
            logprobs=True, top_logprobs=0,
        )  # fmt: skip


class _Reference:
    """Greedy answers of transformers alone to the prompts of training."""

    def __init__(self, folder: Path, spec: ServeSpec) -> None:
        self._model: Any = load_model(ModelSpec(path=str(folder)), dtype=torch.float32).eval()
        self._prompts = PromptBuilder(load_tokenizer(str(folder)), load_encoder(str(folder), spec.media))

    def answer(self, parts: Any) -> tuple[int, list[float]]:
        """(tokens of the prompt, log-probability of each token of the answer)."""
        prompt = self._prompts.chat(asked(*parts))
        names = [name for name in (prompt.media[0] if prompt.media else ()) if name != NUM_PLACEHOLDERS]
        more = {name: torch.from_numpy(np.concatenate([one[name] for one in prompt.media])) for name in names}
        ids, found = list(prompt.ids), list[float]()
        while len(found) < _NUM_TOKENS:
            ids_BT = torch.tensor([ids])
            kinds_BT = (ids_BT == self._model.config.image_token_id).int()
            with torch.no_grad():
                logits = self._model(
                    input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), mm_token_type_ids=kinds_BT, **more
                ).logits[0, -1]
            best = logits.float().log_softmax(-1).max(-1)
            ids.append(int(best.indices))
            found.append(float(best.values))
            if ids[-1] == self._model.generation_config.eos_token_id:
                break
        return len(prompt.ids), found


@pytest.mark.parametrize("family", _FAMILIES)
def test_answers_about_images_are_those_of_transformers_in_any_company(
    endpoint: RunningEndpoint, folders: dict[str, Path], family: str
) -> None:
    reference = _Reference(folders[family], endpoint.spec)
    wanted = [reference.answer(parts) for parts in _QUESTIONS]
    assert len({round(logprobs[0], 4) for _, logprobs in wanted}) == len(_QUESTIONS), "what is shown matters"
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda parts: _ask(endpoint.url, family, parts), _QUESTIONS * 2))
    for reply, (num_tokens, logprobs) in zip(replies, wanted * 2, strict=True):
        assert reply.usage.prompt_tokens == num_tokens
        scored = [one.logprob for one in reply.choices[0].logprobs.content]
        assert scored == pytest.approx(logprobs, abs=1e-4)


def test_bounds_and_what_it_cannot_see_are_refused_and_the_next_one_passes(endpoint: RunningEndpoint) -> None:
    sound = {"type": "input_audio", "input_audio": {"data": "UklGRgAAAABXQVZF", "format": "wav"}}
    for parts, told in (
        ([_ONE, _ONE, _ONE], "more than 2 images"),
        ([image_part(png(picture(1, 200, 101)))], "max_media_pixels"),
        ([image_part(png(picture(1))[:200])], "cannot be decoded"),
        ([image_part(png(picture(1, 20, 5000 // 20))), text_part("word " * 2000)], "maximum context length"),
        ([sound], "does not take"),
    ):
        with pytest.raises(openai.BadRequestError, match=told):
            _ask(endpoint.url, "qwen2_5_vl", parts)
    assert _ask(endpoint.url, "qwen2_5_vl", _QUESTIONS[0]).choices
