"""Replicas on real Ray Serve that come while there is much to answer and go when there is not, at no client's cost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from ray import serve

from rayswift.serving import app
from rayswift.serving.app import serve_in_background
from rayswift.serving.auth import fingerprint
from rayswift.serving.controller import APP_NAME
from rayswift.serving.placement import replica_options
from rayswift.serving.spec import ServeSpec

pytestmark = [pytest.mark.ray, pytest.mark.long]
_KEY = "autoscaling-key-4d1e"
_NUM_BUSY = 6
_PROMPTS = tuple(f"number {i} " * (1 + i) for i in range(_NUM_BUSY))


def _going_sooner(spec: ServeSpec) -> dict[str, Any]:
    """The spec's own options but for the ten minutes that Serve waits before it takes a replica away."""
    config = replica_options(spec)["autoscaling_config"]
    return {"autoscaling_config": {**config, "downscale_delay_s": 5.0}}


def test_a_replica_comes_under_load_and_goes_without_it(
    serving_ray: Callable[[], AbstractContextManager[int]], tiny_model_dir: Path, ray_temp_dir: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(app, "replica_options", _going_sooner)
    with serving_ray() as port:
        spec = ServeSpec(
            models={"tiny": str(tiny_model_dir)}, port=port, engine="local", device="cpu", max_concurrency=8,
            max_replicas=2, target_ongoing_requests=2, api_key_sha256=(fingerprint(_KEY),),
        )  # fmt: skip
        with serve_in_background(spec) as running:
            alone = [_ask(running.url, prompt) for prompt in _PROMPTS]
            assert _num_replicas() == 1
            with _asking(running.url, _PROMPTS) as busy:
                _until(lambda: _num_replicas() == 2, "a second replica comes")
                _until(lambda: _num_that_answered(ray_temp_dir) == 2, "it answers too")
            with _asking(running.url, _PROMPTS[:1]) as calm:  # one at a time is no more than one replica's share
                _until(lambda: _num_replicas() == 1, "one of them goes")
                asked = len(calm[0])
                _until(lambda: len(calm[0]) >= asked + 3, "the other answers on")
    for texts, one in zip([*busy, *calm], [*alone, alone[0]], strict=True):
        assert set(texts) == {one}


@contextmanager
def _asking(url: str, prompts: tuple[str, ...]) -> Iterator[list[list[str]]]:
    """The answers to each prompt, asked again and again by a client of its own. One without an answer raises."""
    answers: list[list[str]] = [[] for _ in prompts]
    ended = threading.Event()

    def ask_on(i: int) -> None:
        while not ended.is_set():
            answers[i].append(_ask(url, prompts[i]))

    with ThreadPoolExecutor(len(prompts)) as pool:
        clients = [pool.submit(ask_on, i) for i in range(len(prompts))]
        try:
            yield answers
        finally:
            ended.set()
    for client in clients:
        client.result()


def _ask(url: str, prompt: str) -> str:
    """A greedy answer that takes a while; once, and on a connection of its own."""
    with openai.OpenAI(base_url=url, api_key=_KEY, max_retries=0, timeout=60) as client:
        return client.completions.create(model="tiny", prompt=prompt, max_tokens=100, temperature=0).choices[0].text


def _num_replicas() -> int:
    """How many there are of the endpoint, those that start or end included; 0 while only some of them run."""
    states = serve.status().applications[APP_NAME].deployments["endpoint"].replica_states
    return sum(states.values()) if set(states) == {"RUNNING"} else 0


def _num_that_answered(folder: str) -> int:
    """How many replicas have told in their log of a completion."""
    logs = {path.resolve() for path in Path(folder).rglob("replica_*endpoint*.log")}
    return sum("/v1/completions" in log.read_text() for log in logs)


def _until(condition: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        threading.Event().wait(0.2)
