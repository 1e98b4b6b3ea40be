"""Images and sounds in chat requests: asked by the official client, refused by name, answered as in any company."""

from __future__ import annotations

import asyncio
import io
import wave
from base64 import b64encode
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from rayswift.config.job import MediaSpec, ModelSpec
from rayswift.data.media import MARKS
from rayswift.data.tokenize import encode
from rayswift.data.types import Medium, Sample
from rayswift.data.types import Message as Turn
from rayswift.models.loading import load_model, load_tokenizer
from rayswift.models.processor import load_processor
from rayswift.serving.admission import Admission
from rayswift.serving.api_errors import ApiError
from rayswift.serving.engine import Delta, EngineOptions, FakeEngine, Prompt, Request, Sampling
from rayswift.serving.engines.local import Local
from rayswift.serving.http import ServedModel, build_asgi
from rayswift.serving.local.batch import SlotBatch
from rayswift.serving.openai import Message
from rayswift.serving.prompts import PromptBuilder
from rayswift.serving.spec import ServeSpec
from rayswift.training.media import load_encoder
from tests.multimodal_models import FAMILIES, make

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept")  # processors asked directly
torch.set_num_threads(1)
_BOUNDS: dict[str, Any] = {
    "max_media": 2, "max_media_bytes": 60_000, "max_media_pixels": 20_000, "max_media_seconds": 2.0,
    "max_body_bytes": 4000,
}  # fmt: skip


def picture(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def png(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def wav(seed: int, seconds: float = 1.0) -> bytes:
    samples = np.random.default_rng(seed).normal(scale=8000, size=int(16000 * seconds)).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(samples.tobytes())
    return buffer.getvalue()


def image_part(content: bytes, media_type: str = "image/png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:{media_type};base64,{b64encode(content).decode()}"}}


def audio_part(content: bytes, kind: str = "wav") -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": b64encode(content).decode(), "format": kind}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def asked(*parts: dict[str, Any]) -> list[Message]:
    return [Message(role="user", content=list(parts))]  # type: ignore[arg-type]


class _Served:
    """A started engine on an event loop of its own, its prompts, and an endpoint over both."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._runner = folder, asyncio.Runner()
        self.spec = ServeSpec(models={"m": str(folder)}, **_BOUNDS)
        self.engine = Local(str(folder), EngineOptions(max_concurrency=6, device="cpu", media=self.spec.media))
        self.run(self.engine.start())
        self.encoder = self.engine.media_encoder
        self.prompts = PromptBuilder(load_tokenizer(str(folder)), self.encoder, self.spec.max_media)
        served = ServedModel(self.engine, self.prompts, Admission(6, 6))
        self.app = build_asgi(self.spec, {"m": served})
        self.admission = served.admission

    def run(self, work: Any) -> Any:
        return self._runner.run(work)

    async def answer(self, prompt: Prompt, num_tokens: int = 12, logprobs: int | None = None) -> Delta:
        total, sampling = Delta("", 0), Sampling(num_tokens, temperature=0, logprobs=logprobs)
        async for delta in self.engine.generate(Request("r", prompt, sampling)):
            total = total + delta
        return total

    def client(self) -> openai.AsyncOpenAI:
        transport = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://localhost", timeout=20)
        return openai.AsyncOpenAI(
            base_url="http://localhost/v1", api_key="none", max_retries=0, http_client=transport
        )  # fmt: skip

    def close(self) -> None:
        self.run(self.engine.close())
        self._runner.close()


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    started: dict[str, _Served] = {}

    def serve(name: str) -> _Served:
        if name not in started:
            started[name] = _Served(make(name, tmp_path_factory.mktemp("served") / name))
        return started[name]

    yield serve
    for one in started.values():
        one.close()


def _parts_of(served: _Served) -> list[dict[str, Any]]:
    """A question with each kind of media that the model takes, of those a client can send."""
    assert served.encoder is not None
    image = [image_part(png(picture(1)))] if "image" in served.encoder.tokens else []
    audio = [audio_part(wav(1))] if "audio" in served.encoder.tokens else []
    return [text_part("What is "), *image, *audio, text_part("in the picture?")]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_request_with_media_is_answered_the_same_in_any_company(families: Any, family: str) -> None:
    served = families(family)
    assert isinstance(served.engine._started()._batch, SlotBatch)
    shown = served.prompts.chat(asked(*_parts_of(served)))
    other = served.prompts.chat(asked(*reversed(_parts_of(served))))
    text = served.prompts.chat(asked(text_part("Who are they? A digit.")))
    prompts = [text, shown, other, text, other, shown]
    lengths = [20, 12, 3, 5, 16, 7]
    alone = [served.run(served.answer(prompt, count)) for prompt, count in zip(prompts, lengths, strict=True)]

    async def together() -> list[Delta]:
        return await asyncio.gather(*map(served.answer, prompts, lengths))

    assert served.run(together()) == alone
    assert len({delta.text for delta in alone}) >= 2


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "idefics3"])
def test_greedy_text_is_that_of_transformers_with_the_processors_own_inputs(families: Any, family: str) -> None:
    """One image, two images, and a text, each generated by transformers alone."""
    served = families(family)
    processor, model = load_processor(str(served.folder)), load_model(ModelSpec(path=str(served.folder)))
    tokenizer = load_tokenizer(str(served.folder))
    one, two = picture(1), picture(2, 70, 90)
    firsts = set()
    for images in ([one], [one, two], []):
        parts = [*(image_part(png(image)) for image in images), text_part("What is it?")]
        kinds = [{"type": "image"}] * len(images) + [text_part("What is it?")]
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": kinds}], tokenize=False, add_generation_prompt=True
        )
        inputs = processor(text=[rendered], images=images or None, return_tensors="pt")
        inputs.pop("num_patches", None)
        prompt = served.prompts.chat(asked(*parts))
        assert list(prompt.ids) == inputs["input_ids"][0].tolist()
        found = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=16,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
        ids = found.sequences[0, len(prompt.ids) :]
        answer = served.run(served.answer(prompt, 16, 0))
        assert answer.text == tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")
        expected = [float(one[0].log_softmax(-1).max()) for one in found.logits]
        assert [one.logprob for one in answer.logprobs] == pytest.approx(expected[: len(answer.logprobs)], abs=1e-5)
        firsts.add(round(expected[0], 4))
    assert len(firsts) == 3  # what is shown matters


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm", "qwen2_audio"])
def test_the_prompt_is_that_of_training(families: Any, family: str) -> None:
    served = families(family)
    assert served.encoder is not None
    kind = "audio" if family == "qwen2_audio" else "image"
    content = wav(1) if kind == "audio" else png(picture(1))
    part = audio_part(content) if kind == "audio" else image_part(content)
    medium = Medium(kind, content)
    sample = Sample((Turn("user", f"What is {MARKS[kind]}in it?", media=(medium,)), Turn("assistant", "A digit.")))
    encoder = load_encoder(str(served.folder), MediaSpec())
    (trained,) = encode(
        [sample], load_tokenizer(str(served.folder)), max_length=4096, rendering="chat", media=encoder,
        encoded=[encoder.encode(sample, "")],
    )  # fmt: skip
    assert isinstance(trained, list)
    [example] = trained
    prompt = served.prompts.chat(asked(text_part("What is "), part, text_part("in it?")))
    begin = next(place for place, weight in enumerate(example.loss_mask) if weight)
    assert list(prompt.ids) == example.input_ids[:begin]
    for name, values in example.media[0].items():
        assert np.array_equal(values, prompt.media[0][name])
    if example.rope_AT is not None:
        assert prompt.rope_AT is not None
        assert np.array_equal(example.rope_AT[:, :begin], prompt.rope_AT)


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
    ([image_part(_PNG[:8] + b"rubbish")], 400, "has an image that cannot be decoded"),
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


def _refused(served: _Served, content: Any) -> tuple[int, dict[str, Any]]:
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
