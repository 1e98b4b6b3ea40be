"""An exported model with a vision tower on real Ray Serve, asked about images by the official OpenAI client."""

from __future__ import annotations

import io
import socket
from base64 import b64encode
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from rayswift.export.pipeline import export
from rayswift.serving.app import serve_in_background
from rayswift.serving.spec import ServeSpec
from tests.multimodal_models import make

pytestmark = pytest.mark.ray


def _question(seed: int) -> Any:
    values = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    url = "data:image/png;base64," + b64encode(buffer.getvalue()).decode()
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}},
                                         {"type": "text", "text": "Which digit is this?"}]}]  # fmt: skip


def test_an_exported_llava_is_asked_about_images(tmp_path: Path, ray_local: None) -> None:
    base = make("llava", tmp_path / "base")
    export(str(base), str(tmp_path / "out"))
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    spec = ServeSpec(
        models={"eyes": str(tmp_path / "out")}, port=port, engine="local", device="cpu", max_media_bytes=100_000
    )
    with (
        serve_in_background(spec) as running,
        openai.OpenAI(base_url=running.url, api_key="none", max_retries=0, timeout=60) as client,
    ):
        firsts = set()
        for seed in (1, 2, 1):
            reply = client.chat.completions.create(
                model="eyes", messages=_question(seed), max_tokens=6, temperature=0, logprobs=True
            )
            assert reply.choices[0].logprobs is not None
            assert reply.choices[0].logprobs.content
            firsts.add(round(reply.choices[0].logprobs.content[0].logprob, 5))
        assert len(firsts) == 2  # the same image twice, and another
        wrong: Any = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}]
        with pytest.raises(openai.BadRequestError, match="fetches no URL") as caught:
            client.chat.completions.create(model="eyes", messages=[{"role": "user", "content": wrong}])
        assert caught.value.param == "messages[0].content"
