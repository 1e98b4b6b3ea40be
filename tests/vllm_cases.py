"""vLLM's own server over a folder that our endpoint serves too, and the official client of both."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from rayswift.serving.app import serve_in_background
from rayswift.serving.environment import interpreter_of
from rayswift.serving.spec import ServeSpec

FOUND = interpreter_of("vllm", None)
MARKS = [
    pytest.mark.vllm,
    pytest.mark.long,
    pytest.mark.ray,
    pytest.mark.skipif(FOUND.problem is not None, reason=f"no serving environment: {FOUND.problem}"),
]
KV_BYTES = 2**28
Pair = tuple[openai.OpenAI, openai.OpenAI]
"""The client of our endpoint and that of vLLM's own."""


@contextmanager
def own_server(folder: Path, log: Path, port: int, *options: str) -> Iterator[str]:
    """The URL of `vllm serve`, which answers for a folder as the model `m`."""
    from rayswift.serving.engines.vllm import Vllm

    command = [
        FOUND.path, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--host", "127.0.0.1", "--port",
        str(port), "--served-model-name", "m", "--dtype", "float32", "--max-num-seqs", "8", "--kv-cache-memory-bytes",
        str(KV_BYTES), "--enforce-eager", "--disable-log-stats", *options,
    ]  # fmt: skip
    variables = {**Vllm.environment, **Vllm.environment_on_cpu, "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | variables)
    try:
        deadline = time.monotonic() + 400
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5, trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def clients(ours: str, theirs: str) -> Iterator[Pair]:
    with (
        openai.OpenAI(base_url=ours, api_key="none", max_retries=0, timeout=120) as one,
        openai.OpenAI(base_url=theirs, api_key="none", max_retries=0, timeout=120) as other,
    ):
        yield one, other


def both(pair: Pair, ask: Callable[[openai.OpenAI], Any]) -> Any:
    """What both answer, which is the same."""
    ours, theirs = (ask(client) for client in pair)
    assert ours == theirs
    return ours


@contextmanager
def pair_over(
    folder: Path, log: Path, port: int, serving_ray: Callable[[], AbstractContextManager[int]], max_len: int | None,
    options: tuple[str, ...] = (), **spec: Any,
) -> Iterator[Pair]:  # fmt: skip
    """The clients of both over one folder: `spec` is for ours, `options` for theirs, at `port`."""
    length = () if max_len is None else ("--max-model-len", str(max_len))
    with serving_ray() as our_port:
        serve = ServeSpec(models={"m": str(folder)}, port=our_port, engine="vllm", max_concurrency=8,
                          max_model_len=max_len, kv_cache_bytes=KV_BYTES, **spec)  # fmt: skip
        with (
            serve_in_background(serve) as running,
            own_server(folder, log, port, *length, *options) as theirs,
            clients(running.url, theirs) as made,
        ):
            yield made
