"""An answer that nobody waits for any more is ended in vLLM: the one place it had is the next request's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from rayswift.models.init import init_model
from rayswift.serving.app import RunningEndpoint, serve_in_background
from rayswift.serving.spec import ServeSpec
from tests import vllm_cases
from tests.promotion_cases import until

pytestmark = vllm_cases.MARKS
_LONG: dict[str, Any] = {"model": "m", "prompt": "the quick brown fox", "max_tokens": 3000, "temperature": 0}
_SHORT = _LONG | {"max_tokens": 2}


@pytest.fixture(scope="module")
def endpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_text: Path, serving_ray: Callable[[], AbstractContextManager[int]]
) -> Iterator[RunningEndpoint]:
    folder = tmp_path_factory.mktemp("abort") / "m"
    init_model(
        str(folder), arch="qwen3", layers=2, hidden_size=128, heads=4, kv_heads=2, vocab_size=512, max_length=4096,
        train_tokenizer_files=[str(tiny_text)], seed=0,
    )  # fmt: skip
    with serving_ray() as port:
        spec = ServeSpec(models={"m": str(folder)}, port=port, engine="vllm", max_concurrency=1, max_queued=0,
                         max_new_tokens=3000, kv_cache_bytes=vllm_cases.KV_BYTES)  # fmt: skip
        with serve_in_background(spec) as running:
            yield running


@pytest.fixture(scope="module")
def whole_s(endpoint: RunningEndpoint) -> float:
    """Seconds that the whole long answer takes."""
    began = time.monotonic()
    reply = httpx.post(f"{endpoint.url}/completions", json=_LONG, timeout=300, trust_env=False).json()
    assert reply["choices"][0]["finish_reason"] == "length"
    return time.monotonic() - began


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_client_that_goes_away_leaves_its_place_to_the_next_one(
    endpoint: RunningEndpoint, whole_s: float, stream: bool
) -> None:
    url = f"{endpoint.url}/completions"
    with httpx.Client(trust_env=False, timeout=60) as client:

        def short() -> int:
            return client.post(url, json=_SHORT).status_code

        if stream:
            with client.stream("POST", url, json=_LONG | {"stream": True}) as reply:
                lines = reply.iter_lines()
                assert next(lines).startswith("data: ")
                assert short() == 429  # there is one place
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(url, json=_LONG, timeout=whole_s / 8)
        gone = time.monotonic()
        until(lambda: short() == 200, "the next one is answered")
    # vLLM runs one answer at a time here: a second one would have waited for the end of the first.
    assert time.monotonic() - gone < whole_s / 4
