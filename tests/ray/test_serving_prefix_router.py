"""The prefix-aware router on real Ray Serve: prompts that begin alike meet in one replica, and load still counts.

Asked as a front asks: in a process with a front's environment, through `RemoteEngine`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import serve

from rayswift.serving.engine import Delta, Prompt, Request, Sampling
from rayswift.serving.placement import actor_options, front_options, routing_options
from rayswift.serving.prefix_router import as_text
from rayswift.serving.remote import RemoteEngine
from rayswift.serving.spec import ServeSpec

_SPEC = ServeSpec(models={"m": "unused"}, engine="local", promotable=True, routing="prefix", max_concurrency=8)


@given(st.lists(st.integers(0, 300_000), max_size=20), st.lists(st.integers(0, 300_000), max_size=20))
def test_texts_are_equal_where_ids_are(a: list[int], b: list[int]) -> None:
    one, other = as_text(tuple(a)), as_text(tuple(b))
    assert (len(one), one == other) == (len(a), a == b)
    assert one.encode().decode() == one  # no half of a surrogate pair, which no process could be told


class _Who:
    """A replica of a version whose answers say which one it is, at once or when it is told to."""

    def __init__(self) -> None:
        self._gate, self._num_held = asyncio.Event(), 0

    async def generate(self, request: Request) -> AsyncGenerator[Delta | None, None]:
        yield None
        if request.request_id == "held":
            self._num_held += 1
            try:
                await self._gate.wait()
            finally:
                self._num_held -= 1
        yield Delta(await self.name(), 1, "stop")

    async def num_held(self) -> int:
        return self._num_held

    async def name(self) -> str:
        return serve.get_replica_context().replica_id.unique_id

    async def release(self) -> None:
        self._gate.set()


class _Front:
    """Asks the version, and hands on what it said."""

    def __init__(self) -> None:
        self._handle = serve.get_app_handle("who")
        self._engine = RemoteEngine(self._handle, _SPEC, "unused")

    async def ask(self, request: Request) -> str:
        return "".join([delta.text async for delta in self._engine.generate(request)])

    async def name_of_any(self) -> str:
        name: str = await self._handle.name.remote()
        return name


@dataclass(frozen=True)
class _Endpoint:
    """The handles of both applications."""

    front: Any
    version: Any

    def ask(self, *ids: int, request_id: str = "r") -> Any:
        return self.front.ask.remote(Request(request_id, Prompt(ids), Sampling(1)))


@pytest.fixture
def endpoint(ray_local: None) -> Iterator[_Endpoint]:
    serve.start(proxy_location="Disabled")
    environment = {"num_cpus": 0.1, "runtime_env": actor_options(_SPEC)["runtime_env"]}
    who: Any = serve.deployment(
        name="who", num_replicas=2, max_ongoing_requests=100, ray_actor_options=environment, **routing_options(_SPEC)
    )(_Who)
    version = serve.run(who.bind(), name="who", route_prefix=None)
    front: Any = serve.deployment(name="front", max_ongoing_requests=100, ray_actor_options=front_options(_SPEC))(
        _Front
    )
    yield _Endpoint(serve.run(front.bind(), name="front", route_prefix=None), version)
    serve.shutdown()


@pytest.mark.ray
def test_prompts_that_begin_alike_meet_in_one_replica(endpoint: _Endpoint) -> None:
    ask, system = endpoint.ask, tuple(range(100, 400))
    first = ask(*system, 1).result(timeout_s=60)
    assert {ask(*system, 2 + i, 9).result(timeout_s=60) for i in range(12)} == {first}
    others = {ask(*range(10_000 * i, 10_000 * i + 50)).result(timeout_s=60) for i in range(1, 9)}
    assert len(others) == 2  # what nobody has in its cache goes to whom has least there
    assert endpoint.front.name_of_any.remote().result(timeout_s=60) in others  # what has no prompt goes by load

    # A replica that is much busier than the other is not given more for its cache's sake.
    held = []
    for _ in range(12):
        held.append(ask(*system, request_id="held"))
        _until_routed(endpoint.version, len(held))
    endpoint.version.broadcast("release").results(timeout_s=60)
    assert {response.result(timeout_s=60) for response in held} == others


def _until_routed(version: Any, count: int) -> None:
    deadline = time.monotonic() + 60
    while sum(version.broadcast("num_held").results(timeout_s=60)) < count:
        assert time.monotonic() < deadline, "not in time: all are with a replica"
        time.sleep(0.05)
