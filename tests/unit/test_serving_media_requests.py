"""Chat requests with images and sounds: asked by the official client, and refused by name."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import hypothesis.strategies
import openai
import pytest
import torch
from PIL import Image

import rayswift.data.media.encoder
from rayswift.config.job import MediaSpec
from rayswift.models.loading import load_tokenizer
from rayswift.serving.admission import Admission
from rayswift.serving.api_errors import ApiError
from rayswift.serving.engine import EngineOptions, FakeEngine
from rayswift.serving.engines.local import Local
from rayswift.serving.http import build_asgi
from rayswift.serving.openai import ChatRequest, parse
from rayswift.serving.prompts import PromptBuilder
from rayswift.serving.served import ServedModel
from rayswift.serving.spec import ServeSpec
from rayswift.training.media import load_encoder
from tests.multimodal_models import make
from tests.serving_media_cases import (
    Served,
    asked,
    audio_part,
    image_part,
    picture,
    png,
    served_families,
    text_part,
    wav,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept")  # processors asked directly
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    yield from served_families(tmp_path_factory.mktemp("served"))


def test_the_official_client_asks_about_an_image(families: Any) -> None:
    served = families("llava")
    content: list[Any] = [image_part(png(picture(1))), text_part("Which digit is this?")]

    async def scenario() -> None:
        async with served.client() as client:
            turns: list[Any] = [{"role": "user", "content": content}]
            reply = await client.chat.completions.create(model="m", messages=turns, max_tokens=8, temperature=0)
            assert reply.usage is not None
            assert reply.usage.prompt_tokens > 16  # the image's own tokens count
            for kind in ("JPEG", "WEBP", "GIF"):
                turns = [{"role": "user", "content": [image_part(png(picture(1), kind))]}]
                await client.chat.completions.create(model="m", messages=turns, max_tokens=1)
            turns = [{"role": "user", "content": content}, reply.choices[0].message, {"role": "user", "content": "So?"}]
            stream = await client.chat.completions.create(
                model="m", messages=turns, max_tokens=4, n=2, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            assert chunks[-1].usage is not None

    served.run(scenario())
    assert served.admission.in_flight == 0


def test_the_official_client_asks_about_a_sound(families: Any) -> None:
    served = families("qwen2_audio")

    async def scenario() -> None:
        async with served.client() as client:
            turns: list[Any] = [{"role": "user", "content": [audio_part(wav(1)), text_part("Which digit?")]}]
            reply = await client.chat.completions.create(model="m", messages=turns, max_tokens=8, temperature=0)
            assert reply.usage is not None
            assert reply.usage.prompt_tokens > 20

    served.run(scenario())


_PNG = png(picture(1))
_URL = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
_BAD: list[tuple[Sequence[Any], int, str]] = [
    ([_URL], 400, "this server fetches no URL"),
    ([{"type": "image_url", "image_url": {"url": "HTTP://169.254.169.254/"}}], 400, "this server fetches no URL"),
    ([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], 400, "this server fetches no URL"),
    ([{"type": "image_url", "image_url": {"url": "/etc/passwd"}}], 400, "of the form data:image/png;base64"),
    ([{"type": "image_url", "image_url": {"url": "data:image/png,abc"}}], 400, "is not base64"),
    ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}], 400, "is not base64"),
    ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}], 400, "is not a PNG"),
    ([{"type": "image_url", "image_url": _URL["image_url"]["url"]}], 400, "must be an object with url"),  # type: ignore[index]
    ([{"type": "image_url"}], 400, "must be an object with url"),
    ([{"type": "image_url", "image_url": {"url": 3}}], 400, "a url that is a string"),
    ([{"type": "image_url", "image_url": image_part(_PNG)["image_url"] | {"detail": "low"}}], 400, "detail"),
    ([{"type": "image_url", "image_url": image_part(_PNG)["image_url"] | {"x": 1}}], 400, "x is not supported"),
    ([image_part(_PNG) | {"cache": 1}], 400, "cache is not supported"),
    ([{"type": "video_url", "video_url": {"url": "data:,"}}], 400, "not video_url"),
    ([image_part(b"%!PS-Adobe-3.0 EPSF-3.0\n")], 400, "is not a PNG"),
    ([image_part(b"not an image")], 400, "is not a PNG"),
    ([image_part(_PNG[:200])], 400, "has an image that cannot be decoded"),
    ([image_part(_PNG[:8] + b"rubbish")], 400, "has an image that cannot be decoded: cannot identify image file"),
    ([image_part(png(Image.new("RGB", (200, 101))))], 400, "over max_media_pixels=20000"),
    ([image_part(png(picture(1, 160, 125)))], 400, "more than max_media_bytes=60000"),
    ([image_part(_PNG)] * 3, 400, "more than 2 images or sounds"),
    ([image_part(_PNG)] * 40, 413, "the body is larger than"),
    ([text_part("x" * 5000)], 413, "the body is larger than 4000"),
    ([audio_part(wav(1))], 400, "has an audio, which the model does not take"),
    ([audio_part(wav(1), "flac")], 400, "must be wav or mp3"),
    ([audio_part(b"#EXTM3U\nfile:///etc/passwd")], 400, "is not a wav file"),
    ([{"type": "input_audio", "input_audio": {"data": "!", "format": "wav"}}], 400, "is not base64"),
    ([{"type": "input_audio", "input_audio": {"format": "wav"}}], 400, "a string of base64"),
    ([text_part("What is <image>?")], 400, "<image>, which stands for a medium"),
    ([image_part(_PNG), text_part("and \ue000?")], 400, "which stands for a medium"),
]


def _refused(served: Served, content: Any) -> tuple[int, dict[str, Any]]:
    async def scenario() -> tuple[int, dict[str, Any]]:
        async with served.client() as client:
            turns: list[Any] = [{"role": "user", "content": content}]
            with pytest.raises(openai.APIStatusError) as caught:
                await client.chat.completions.create(model="m", messages=turns, max_tokens=2)
            return caught.value.status_code, caught.value.response.json()["error"]

    return served.run(scenario())  # type: ignore[no-any-return]


@pytest.mark.parametrize(("content", "status", "message"), _BAD, ids=[rule[2] for rule in _BAD])
def test_what_is_no_image_is_refused_by_name(families: Any, content: Any, status: int, message: str) -> None:
    served = families("llava")
    found, error = _refused(served, content)
    assert (found, error["type"]) == (status, "invalid_request_error")
    assert message in error["message"]
    assert " 0x" not in error["message"], "an address of this process"
    if status == 400:
        assert error["code"] == "invalid_value"
        assert error["param"] in ("messages[0].content", "messages")
    assert served.admission.in_flight == 0


def test_a_sound_that_is_too_long_or_damaged_is_refused(families: Any) -> None:
    served = families("qwen2_audio")
    served.prompts._encoder = load_encoder(
        str(served.folder), MediaSpec(max_bytes=10**6, max_audio_seconds=2.0)
    )  # fmt: skip
    hasty = bytearray(wav(1))
    hasty[27] = 80  # samples of more than a gigahertz, for which FFmpeg has no memory
    for content, message in (
        (wav(1, 3.0), "max_media_seconds=2"),
        (wav(1)[:40], "has an audio"),
        (wav(1, 0.002), "processor leaves nothing"),
        (bytes(hasty), "has an audio"),
    ):
        with pytest.raises(ApiError, match=message):
            served.prompts.chat(asked(audio_part(content)))


def _error_of(work: Callable[[], Any]) -> tuple[int, str | None, str | None] | None:
    try:
        work()
    except ApiError as error:
        return error.status, error.code, error.param
    return None


@pytest.mark.parametrize("family", ["llava", "qwen2_audio"])
def test_damaged_files_are_read_or_refused_and_nothing_else(families: Any, family: str) -> None:
    served, chance = families(family), random.Random(0)
    served.prompts._encoder = load_encoder(str(served.folder), MediaSpec())
    whole = [wav(1), wav(2, 0.1)] if family == "qwen2_audio" else [
        png(picture(1), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF")
    ]  # fmt: skip
    refused = 0
    for _ in range(80):
        content = bytearray(chance.choice(whole))
        del content[chance.choice([len(content), chance.randrange(13, len(content))]) :]
        for _ in range(chance.randrange(6)):
            content[chance.randrange(12, len(content))] = chance.randrange(256)
        part = audio_part(bytes(content)) if family == "qwen2_audio" else image_part(bytes(content))
        error = _error_of(lambda part=part: served.prompts.chat(asked(part)))
        assert error in (None, (400, "invalid_value", "messages[0].content"))
        refused += error is not None
    assert 0 < refused < 80


_JSON = hypothesis.strategies.recursive(
    hypothesis.strategies.none() | hypothesis.strategies.integers() | hypothesis.strategies.sampled_from(
        ["text", "image_url", "input_audio", "data:image/png;base64,AAAA", "http://a", "", "{type}", "wav", "UklGRg=="]
    ),
    lambda inner: hypothesis.strategies.lists(inner, max_size=3) | hypothesis.strategies.dictionaries(
        hypothesis.strategies.sampled_from(["type", "text", "image_url", "input_audio", "url", "data", "{x}"]),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@hypothesis.given(content=_JSON)
def test_any_content_is_taken_or_refused(content: Any) -> None:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": content}]}).encode()
    assert _error_of(lambda: parse(ChatRequest, body)) in (None, (400, "invalid_value", "messages[0].content"))


def test_a_model_may_be_served_without_media(families: Any) -> None:
    served = families("llava")
    prompts = PromptBuilder(load_tokenizer(str(served.folder)), served.encoder, 0)
    assert not prompts.takes_media
    with pytest.raises(ApiError, match="more than 0 images or sounds"):
        prompts.chat(asked(image_part(_PNG)))
    assert prompts.chat(asked(text_part("Hi"))).media == ()


def test_a_picture_that_the_processor_refuses_is_refused(families: Any) -> None:
    prompts = families("qwen2_5_vl").prompts
    with pytest.raises(ApiError, match="aspect ratio") as caught:
        prompts.chat([*asked(text_part("Hi")), *asked(image_part(png(picture(1, 900, 1))))])
    assert (caught.value.status, caught.value.param) == (400, "messages[1].content")
    with pytest.raises(ApiError, match="stands for a medium"):
        prompts.chat(asked(text_part("<|video_pad|>")))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA"])
def test_pictures_of_every_mode_are_read(families: Any, mode: str) -> None:
    families("llava").prompts.chat(asked(image_part(png(picture(1).convert(mode)))))


def test_texts_are_read_while_a_picture_is_decoded(families: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    served, begun, decoded = families("llava"), threading.Event(), threading.Event()
    own = rayswift.data.media.encoder.decode_image

    def decode_image(*given: Any) -> Any:
        begun.set()
        assert decoded.wait(60)
        return own(*given)

    prompts = PromptBuilder(load_tokenizer(str(served.folder)), served.encoder)
    expected = prompts.chat(asked(image_part(_PNG))).ids
    monkeypatch.setattr(rayswift.data.media.encoder, "decode_image", decode_image)
    with ThreadPoolExecutor(2) as pool:
        picture = pool.submit(prompts.chat, asked(image_part(_PNG)))
        try:
            assert begun.wait(60)
            assert pool.submit(prompts.text, "hi").result(30).ids
            assert pool.submit(prompts.chat, asked(text_part("Hi"))).result(30).media == ()
            assert not picture.done()
        finally:
            decoded.set()
        assert picture.result(60).ids == expected


def test_a_text_model_says_so(tiny_model_dir: Path) -> None:
    prompts = PromptBuilder(load_tokenizer(str(tiny_model_dir)))
    app = build_asgi(ServeSpec(models={"m": "x"}), {"m": ServedModel(FakeEngine(), prompts, Admission(1, 1))})

    async def scenario() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            messages = [{"role": "user", "content": [image_part(_PNG)]}]
            return await client.post("/v1/chat/completions", json={"model": "m", "messages": messages})

    response = asyncio.run(scenario())
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "messages[0].content: this model is served with text only"
    assert response.json()["error"]["param"] == "messages[0].content"


def test_a_plain_prompt_has_no_place_for_media(families: Any) -> None:
    served = families("llava")
    assert served.prompts.text("What is it?").media == ()
    for prompt in ("What is <image>?", list(served.encoder.placeholders.values())):
        with pytest.raises(ApiError, match="<image>, which stands for a medium"):
            served.prompts.text(prompt)


def test_a_model_whose_processor_cannot_be_loaded_is_served_with_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make("llava", tmp_path / "base")
    (folder / "processor_config.json").write_text('{"processor_class": "UnheardOfProcessor"}')
    engine = Local(str(folder), EngineOptions(max_concurrency=2, device="cpu"))

    async def scenario() -> None:
        await engine.start()
        await engine.close()

    asyncio.run(scenario())
    assert engine.media_encoder is None
    assert "is served with text alone" in caplog.text
