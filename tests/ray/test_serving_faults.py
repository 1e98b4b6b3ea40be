"""Faults on real Ray Serve: a killed replica, an update under load, a flood; each costs what it must, nothing else."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
from ray import serve

from rayswift.cluster.session import worker_python
from rayswift.serving import controller
from rayswift.serving.app import RunningEndpoint, build_app, serve_in_background
from rayswift.serving.controller import APP_NAME
from rayswift.serving.spec import ServeSpec

pytestmark = pytest.mark.ray
_NUM_REPLICAS, _NUM_STREAMS = 2, 6
_LONG: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 1900, "temperature": 0, "stream": True}
_SHORT: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def endpoint(tiny_model_dir: Path, ray_temp_dir: str) -> Iterator[RunningEndpoint]:
    ray.init(
        address="local", num_cpus=4, _temp_dir=ray_temp_dir, include_dashboard=False, log_to_driver=False,
        configure_logging=False, object_store_memory=100 * 2**20, runtime_env=worker_python(),
    )  # fmt: skip
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    spec = ServeSpec(
        models={"tiny": str(tiny_model_dir)}, port=port, max_concurrency=8, max_queued=2, max_model_len=2048,
        max_new_tokens=1900, num_replicas=_NUM_REPLICAS, device="cpu", engine="local",
    )  # fmt: skip
    try:
        with serve_in_background(spec) as running:
            yield running
    finally:
        ray.shutdown()


@dataclass
class _Replica:
    actor: Any
    pid: int

    @property
    def num_ongoing(self) -> int:
        return int(ray.get(self.actor.get_num_ongoing_requests.remote(), timeout=30))


def _replicas() -> list[_Replica]:
    """The replicas that answer a call, with the ids of their processes."""
    found = []
    for named in ray.util.list_named_actors(all_namespaces=True):
        if not named["name"].startswith(f"SERVE_REPLICA::{APP_NAME}#"):
            continue
        try:
            actor = ray.get_actor(named["name"], namespace=named["namespace"])
            found.append(_Replica(actor, ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=30)))
        except (ValueError, ray.exceptions.RayActorError):
            continue  # it has ended since
    return found


@dataclass
class _Stream:
    """A stream read by a thread of its own, to its end or its error."""

    client: openai.OpenAI
    pieces: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    thread: threading.Thread | None = None

    def start(self) -> None:
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        try:
            for chunk in self.client.completions.create(**_LONG):
                self.pieces += [choice.text for choice in chunk.choices]
                self.finish_reason = next((c.finish_reason for c in chunk.choices if c.finish_reason), None)
        except Exception as error:
            self.error = error

    def join(self) -> None:
        assert self.thread is not None
        self.thread.join(120)
        assert not self.thread.is_alive(), "a stream hangs"

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@pytest.fixture
def client(endpoint: RunningEndpoint) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=endpoint.url, api_key="none", max_retries=0, timeout=120) as made:
        yield made


def _until(condition: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        threading.Event().wait(0.05)


def _streams_on_both(client: openai.OpenAI) -> tuple[list[_Stream], list[_Replica]]:
    """Streams that have begun, some on each replica."""
    replicas, streams = _replicas(), list[_Stream]()
    assert len(replicas) == _NUM_REPLICAS
    while len(streams) < _NUM_STREAMS or not all(one.num_ongoing for one in replicas):
        assert len(streams) < 8 * _NUM_REPLICAS, "one replica gets everything"
        stream = _Stream(client)
        stream.start()
        _until(lambda stream=stream: bool(stream.pieces) or stream.error is not None, "a stream begins")
        streams.append(stream)
    assert not [stream.error for stream in streams if stream.error]
    return streams, replicas


def test_a_killed_replica_costs_its_own_streams_and_the_endpoint_heals(
    endpoint: RunningEndpoint, client: openai.OpenAI
) -> None:
    streams, replicas = _streams_on_both(client)
    victim, other = replicas
    num_lost, num_kept = victim.num_ongoing, other.num_ongoing
    assert num_lost + num_kept == len(streams), "a stream had ended before the fault"
    os.kill(victim.pid, signal.SIGKILL)
    patient = client.with_options(max_retries=5)  # the official client asks again when it is told 503
    for _ in range(5):
        assert patient.completions.create(**_SHORT).choices[0].finish_reason == "length"
    for stream in streams:
        stream.join()
    lost = [stream for stream in streams if stream.error is not None]
    kept = [stream for stream in streams if stream.error is None]
    assert (len(lost), len(kept)) == (num_lost, num_kept)
    assert {stream.finish_reason for stream in kept} == {"length"}
    assert len({stream.text for stream in kept}) == 1
    for stream in lost:  # an error event in the stream, which the official client raises
        assert type(stream.error) is openai.APIError
        assert "the replica that answered has ended" in str(stream.error)
        assert kept[0].text.startswith(stream.text)
    _until(lambda: _are_all_running() and victim.pid not in {replica.pid for replica in _replicas()}, "it heals")
    _until(lambda: _all_answered(endpoint), "it answers")


def _are_all_running() -> bool:
    """Whether there are as many replicas as there should be, alive, and in Serve's eyes nothing is left to do."""
    states = serve.status().applications[APP_NAME].deployments["endpoint"].replica_states
    return states == {"RUNNING": _NUM_REPLICAS} and len(_replicas()) == _NUM_REPLICAS


def _all_answered(endpoint: RunningEndpoint, count: int = 8) -> bool:
    """Whether that many requests at once are all answered."""
    with httpx.Client(base_url=endpoint.url, timeout=60) as client, ThreadPoolExecutor(count) as pool:
        found = list(pool.map(lambda _: client.post("/completions", json=_SHORT).status_code, range(count)))
    return found == [200] * count


@pytest.mark.long
def test_an_update_under_load_loses_nothing(endpoint: RunningEndpoint, client: openai.OpenAI) -> None:
    before = {replica.pid for replica in _replicas()}
    streams, _ = _streams_on_both(client)
    stop, outcomes = threading.Event(), Counter[str]()

    def load() -> None:
        while not stop.is_set():
            try:
                outcomes[client.completions.create(**_SHORT).choices[0].finish_reason] += 1
            except Exception as error:
                outcomes[repr(error)] += 1

    threads = [threading.Thread(target=load, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    changed = endpoint.spec.model_copy(update={"max_new_tokens": 1901})
    serve.run_many(
        [serve.RunTarget(build_app(changed), name=APP_NAME, route_prefix="/")], wait_for_applications_running=False
    )
    try:
        _until(lambda: _are_all_running() and not before & {replica.pid for replica in _replicas()}, "an update")
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    for stream in streams:
        stream.join()
    assert set(outcomes) == {"length"}, outcomes
    assert outcomes["length"] > 10
    assert [stream.error for stream in streams] == [None] * len(streams)
    assert {stream.finish_reason for stream in streams} == {"length"}
    with httpx.Client(base_url=endpoint.url, timeout=60) as plain:  # what has changed holds everywhere
        told = {plain.post("/completions", json=_SHORT | {"max_tokens": 9999}).text for _ in range(12)}
    assert len(told) == 1
    assert "1901" in told.pop()


def test_a_flood_is_answered_or_told_to_come_back(endpoint: RunningEndpoint) -> None:
    """Ten times the places at once: everybody gets an answer or a 429 with Retry-After, and nobody waits for it."""
    num_places = (endpoint.spec.max_concurrency + endpoint.spec.max_queued) * _NUM_REPLICAS
    body, waits = _LONG | {"stream": False, "max_tokens": 200}, list[float]()

    def ask(client: httpx.Client) -> int:
        begin = time.monotonic()
        response = client.post("/completions", json=body)
        if response.status_code != 200:
            waits.append(time.monotonic() - begin)
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["code"] == "rate_limit_exceeded"
        return response.status_code

    limits = httpx.Limits(max_connections=None)
    count = 10 * num_places
    with httpx.Client(base_url=endpoint.url, timeout=100, limits=limits) as client, ThreadPoolExecutor(count) as pool:
        found = Counter(pool.map(lambda _: ask(client), range(count)))
    assert set(found) == {200, 429}
    assert found[200] >= num_places
    assert max(waits) < 20
    assert _all_answered(endpoint)


def test_no_header_of_a_client_reaches_into_serve(endpoint: RunningEndpoint) -> None:
    """Serve itself would cut this answer off after a millisecond, or stop at what is not UTF-8 with a bare 500."""
    headers = {
        "x-request-timeout-seconds": b"0.001", "x-request-disconnect-disabled": b"\xff", "x-request-id": b"\xff",
        "serve-multiplexed-model-id": b"\xfe", "x-session-id": b"\xfd",
    }  # fmt: skip
    response = httpx.post(f"{endpoint.url}/completions", json=_SHORT, headers=headers, timeout=60)
    assert response.status_code == 200


def test_closing_gives_answers_a_moment_and_then_ends_them(
    endpoint: RunningEndpoint, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller, "_LAST_WORDS_S", 1.0)
    streams, replicas = _streams_on_both(client)
    begin = time.monotonic()
    endpoint.close()
    took = time.monotonic() - begin
    assert took < 20, "an update lets an answer take minutes, a stop does not"
    for stream in streams:
        stream.join()
    cut = [stream.error for stream in streams if stream.error is not None]
    assert cut, "all of them had ended before"
    for error in cut:  # an error event, for the proxy was there to the last
        assert type(error) is openai.APIError
        assert "the replica that answered has ended" in str(error)
    _until(lambda: not any(_lives(replica.pid) for replica in replicas), "the replicas end", 30)


def test_a_stop_loses_no_answer_that_ends_soon_enough(
    endpoint: RunningEndpoint, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the test above: on the same cluster, an endpoint of its own at the same address."""
    monkeypatch.setattr(controller, "_LAST_WORDS_S", 100.0)  # these answers take seconds, and on a busy machine more
    with serve_in_background(endpoint.spec) as running:
        streams, replicas = _streams_on_both(client)
        closing_it = threading.Thread(target=running.close)
        closing_it.start()
        _until(lambda: _status_of(running) == 503, "nobody else is taken")
        for stream in streams:
            stream.join()
        assert [(stream.error, stream.finish_reason) for stream in streams] == [(None, "length")] * len(streams)
        closing_it.join(60)
        assert not closing_it.is_alive()
    _until(lambda: not any(_lives(replica.pid) for replica in replicas), "the replicas end", 30)


def _status_of(endpoint: RunningEndpoint) -> int:
    response = httpx.get(f"{endpoint.url}/models", timeout=20)
    assert response.status_code == 200 or int(response.headers["retry-after"]) >= 1
    return response.status_code


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
