"""Engines on tiny multimodal models, and requests with pictures and sounds made here."""

from __future__ import annotations

import asyncio
import io
import wave
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
from PIL import Image

from rayswift.models.loading import load_tokenizer
from rayswift.serving.admission import Admission
from rayswift.serving.engine import Delta, EngineOptions, Prompt, Request, Sampling
from rayswift.serving.engines.local import Local
from rayswift.serving.http import build_asgi
from rayswift.serving.messages import Message
from rayswift.serving.prompts import PromptBuilder
from rayswift.serving.served import ServedModel
from rayswift.serving.spec import ServeSpec
from tests.multimodal_models import make

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


class Served:
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


def served_families(folder: Path) -> Iterator[Callable[[str], Served]]:
    """Starts a family's engine in `folder` when it is first asked for, and closes all at the end."""
    started: dict[str, Served] = {}

    def serve(name: str) -> Served:
        if name not in started:
            started[name] = Served(make(name, folder / name))
        return started[name]

    yield serve
    for one in started.values():
        one.close()
