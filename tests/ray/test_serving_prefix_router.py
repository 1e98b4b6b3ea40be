"""The prefix-aware router on real Ray Serve: prompts that begin alike meet in one replica, and load still counts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import serve

from rayswift.serving.engine import Prompt, Request, Sampling
from rayswift.serving.placement import routing_options
from rayswift.serving.prefix_router import as_text
from rayswift.serving.spec import ServeSpec

_SPEC = ServeSpec(models={"m": "unused"}, promotable=True, routing="prefix", max_concurrency=8)


@given(st.lists(st.integers(0, 300_000), max_size=20), st.lists(st.integers(0, 300_000), max_size=20))
def test_texts_are_equal_where_ids_are(a: list[int], b: list[int]) -> None:
    one, other = as_text(tuple(a)), as_text(tuple(b))
    assert (len(one), one == other) == (len(a), a == b)
    assert one.encode().decode() == one  # no half of a surrogate pair, which no process could be told


class _Who:
    """A replica that says which one it is, at once or when it is told to."""

    def __init__(self) -> None:
        self._gate, self._num_held = asyncio.Event(), 0

    async def generate(self, request: Request) -> str:
        if request.request_id == "held":
            self._num_held += 1
            await self._gate.wait()
        return serve.get_replica_context().replica_id.unique_id

    async def num_held(self) -> int:
        return self._num_held

    async def release(self) -> str:
        self._gate.set()
        return serve.get_replica_context().replica_id.unique_id


@pytest.fixture
def handle(ray_local: None) -> Iterator[Any]:
    serve.start(proxy_location="Disabled")
    deployment: Any = serve.deployment(
        name="who", num_replicas=2, max_ongoing_requests=100, ray_actor_options={"num_cpus": 0.1},
        **routing_options(_SPEC),
    )(_Who)  # fmt: skip
    yield serve.run(deployment.bind(), name="who", route_prefix=None)
    serve.shutdown()


def _ask(handle: Any, *ids: int, request_id: str = "r") -> Any:
    return handle.generate.remote(Request(request_id, Prompt(ids), Sampling(1)))


@pytest.mark.ray
def test_prompts_that_begin_alike_meet_in_one_replica(handle: Any) -> None:
    system = tuple(range(100, 400))
    first = _ask(handle, *system, 1).result(timeout_s=60)
    assert {_ask(handle, *system, 2 + i, 9).result(timeout_s=60) for i in range(12)} == {first}
    others = {_ask(handle, *range(10_000 * i, 10_000 * i + 50)).result(timeout_s=60) for i in range(1, 9)}
    assert len(others) == 2  # what nobody has in its cache goes to whom has least there
    assert handle.release.remote().result(timeout_s=60) in others  # what has no prompt goes by load

    # A replica that is much busier than the other is not given more for its cache's sake.
    held = []
    for _ in range(12):
        held.append(_ask(handle, *system, request_id="held"))
        _until_routed(handle, len(held))
    assert set(handle.broadcast("release").results(timeout_s=60)) == others
    assert {response.result(timeout_s=60) for response in held} == others


def _until_routed(handle: Any, count: int) -> None:
    deadline = time.monotonic() + 60
    while sum(handle.broadcast("num_held").results(timeout_s=60)) < count:
        assert time.monotonic() < deadline, "not in time: all are with a replica"
        time.sleep(0.05)
