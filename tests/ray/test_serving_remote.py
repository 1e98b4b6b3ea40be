"""A version's replicas behind Ray Serve's own handle: errors in their own type, streams that end when nobody reads."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray import serve
from ray.exceptions import RayTaskError

from rayswift.errors import ServeError
from rayswift.serving import beats, remote
from rayswift.serving.api_errors import ApiError
from rayswift.serving.engine import Delta, Embedding, FakeEngine, Prompt, Refused, Request, Sampling
from rayswift.serving.placement import actor_options, front_options
from rayswift.serving.prompts import PromptBuilder
from rayswift.serving.remote import RemoteEngine, VersionReplica
from rayswift.serving.served import ServedModel
from rayswift.serving.spec import ServeSpec

pytestmark = pytest.mark.ray
_SPEC = ServeSpec(models={"m": "exports/v1"}, engine="local")


class _Engine(FakeEngine):
    """Fails by what it is asked for, and streams for ever where its first token is 9."""

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        first = request.prompt.ids[0]
        if first == 1:
            raise Refused("token 1 is not known")
        if first == 2:
            raise ApiError("too long", status=413, code="too_large")
        if first == 3:
            raise ValueError("a bug")
        if first == 4:
            os._exit(1)
        if first == 5:
            raise _Unpicklable
        self.running += 1
        try:
            while first == 9:
                yield Delta("x", 1)
                await asyncio.sleep(0.01)
            yield Delta("done", 1, "stop")
        finally:
            self.running -= 1


class _Unpicklable(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("not to be pickled")


class _Replica(VersionReplica):
    async def __init__(self) -> None:  # type: ignore[misc]
        engine = _Engine(embedding=Embedding(3))
        prompts: Any = PromptBuilder(SimpleNamespace(chat_template=None))  # type: ignore[arg-type]  # none is made here
        self._model = ServedModel(engine, prompts, None)  # type: ignore[arg-type]

    async def pid(self) -> int:
        return os.getpid()

    async def running(self) -> int:
        return self._model.engine.running  # type: ignore[attr-defined,no-any-return]


def _actor_options() -> dict[str, Any]:
    return {"num_cpus": 0.1, "runtime_env": actor_options(_SPEC)["runtime_env"]}


@contextmanager
def _running(**options: Any) -> Iterator[Any]:
    deployment: Any = serve.deployment(ray_actor_options=_actor_options(), **options)(_Replica)
    serve.start(proxy_location="Disabled")
    try:
        yield serve.run(deployment.bind(), name="version", route_prefix=None)
    finally:
        serve.shutdown()


@pytest.fixture
def handle(ray_of_module: None) -> Iterator[Any]:
    with _running() as found:
        yield found


def _request(first: int) -> Request:
    return Request("r", Prompt((first,)), Sampling(4))


async def _all(engine: RemoteEngine, first: int) -> str:
    return "".join([delta.text async for delta in engine.generate(_request(first))])


async def _read(deltas: AsyncGenerator[Delta, None]) -> None:
    async for _ in deltas:
        pass


async def _leave(engine: RemoteEngine) -> None:
    deltas = engine.generate(_request(9))
    await anext(deltas)
    await deltas.aclose()


def test_errors_keep_their_type_and_streams_end(handle: Any) -> None:
    async def scenario() -> None:
        engine = RemoteEngine(handle, _SPEC, "exports/v1")
        await engine.start()
        assert await _all(engine, 0) == "done"
        assert np.array_equal(await engine.embed([5]), [5, 1, 1])
        with pytest.raises(Refused, match="token 1 is not known"):
            await _all(engine, 1)
        with pytest.raises(ApiError, match="too long") as caught:
            await _all(engine, 2)
        assert (caught.value.status, caught.value.code) == (413, "too_large")
        with pytest.raises(ServeError, match="failed inside its replica: ValueError"):
            await _all(engine, 3)
        with pytest.raises(ServeError, match="failed inside its replica: _Unpicklable"):
            await _all(engine, 5)
        await _leave(engine)
        task = asyncio.create_task(_all(engine, 9))
        await _until(handle, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await _until(handle, 0)
        with pytest.raises(ServeError, match="was lost with its replica"):
            await _all(engine, 4)

    asyncio.run(scenario())


class _Front:
    """Asks a version from within a request of its own, in the one loop that fronts have."""

    async def __init__(self) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        self._engine = RemoteEngine(serve.get_app_handle("version"), _SPEC, "exports/v1")
        await self._engine.start()

    async def stream(self) -> AsyncGenerator[str, None]:
        async for delta in self._engine.generate(_request(9)):
            yield delta.text

    async def answer(self, first: int) -> str:
        return await _all(self._engine, first)


def test_a_client_that_leaves_a_front_frees_its_place_in_the_version(handle: Any) -> None:
    deployment: Any = serve.deployment(ray_actor_options=front_options(_SPEC), max_ongoing_requests=3)(_Front)
    front = serve.run(deployment.bind(), name="front", route_prefix=None)

    async def scenario() -> None:
        for _ in range(2):  # the places of the front are free again, too
            streams = [front.options(method_name="stream", stream=True).remote() for _ in range(3)]
            for stream in streams:
                assert await anext(stream) == "x"
            await _until(handle, 3)
            for stream in streams:
                stream.cancel()
            await _until(handle, 0)
        assert await front.answer.remote(0) == "done"
        with pytest.raises(RayTaskError, match="token 1 is not known"):
            await front.answer.remote(1)
        with pytest.raises(RayTaskError, match="was lost with its replica"):
            await front.answer.remote(4)

    asyncio.run(scenario())


def test_what_a_replica_that_is_ended_did_not_finish_is_lost(handle: Any) -> None:
    """Its cancelled stream is an error to tell, and not taken for a cancelled client."""

    async def scenario() -> None:
        engine = RemoteEngine(handle, _SPEC, "exports/v1")
        await engine.start()
        deltas = engine.generate(_request(9))
        await anext(deltas)
        ending = asyncio.create_task(asyncio.to_thread(serve.delete, "version"))
        with pytest.raises(ServeError, match="was lost with its replica"):
            await _read(deltas)
        await ending

    asyncio.run(scenario())


def test_a_replica_that_falls_silent_is_lost_after_a_while(handle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one on a machine that has vanished does: a stopped process ends no connection."""
    monkeypatch.setattr(beats, "SILENT_S", 7)  # longer than a replica that is well is ever silent

    async def scenario() -> None:
        engine = RemoteEngine(handle, _SPEC, "exports/v1")
        await engine.start()
        deltas, pid = engine.generate(_request(9)), await handle.pid.remote()
        await anext(deltas)
        os.kill(pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            with pytest.raises(ServeError, match="with its replica, of which nothing was heard for 7 s"):
                await _read(deltas)
            assert time.monotonic() - began < 12
        finally:
            os.kill(pid, signal.SIGKILL)

    asyncio.run(scenario())


def test_a_prompt_with_large_media_reaches_its_replica(handle: Any) -> None:
    """Beyond the 4 MiB that gRPC takes by itself."""
    media = ({"pixel_values": np.zeros((1, 3, 1400, 1400), np.float32)},)

    async def scenario() -> None:
        engine = RemoteEngine(handle, _SPEC, "exports/v1")
        await engine.start()
        request = Request("r", Prompt((0,), media), Sampling(4))
        assert [delta.text async for delta in engine.generate(request)] == ["done"]

    asyncio.run(scenario())


def test_a_full_replica_is_not_down(ray_of_module: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One place and one that waits for it: the third is refused by Serve at once, the second in time by us."""
    monkeypatch.setattr(remote, "_TAKEN_TIMEOUT_S", 2)

    async def scenario(handle: Any) -> None:
        engine = RemoteEngine(handle, _SPEC, "exports/v1")
        await engine.start()
        running = engine.generate(_request(9))
        await anext(running)
        refused = [asyncio.create_task(_all(engine, 0)) for _ in range(2)]
        while not all(task.done() for task in refused):
            await anext(running)
        for task in refused:
            error = task.exception()
            assert isinstance(error, ApiError), error
            assert (error.status, error.headers) == (429, {"Retry-After": "2"})
        engine.check()
        await running.aclose()
        assert await _all(engine, 0) == "done"  # as soon as there is a place

    with _running(max_ongoing_requests=1, max_queued_requests=1) as handle:
        asyncio.run(scenario(handle))


async def _until(handle: Any, num_running: int) -> None:
    deadline = time.monotonic() + 30
    while await handle.running.remote() != num_running:
        assert time.monotonic() < deadline, "a stream that nobody reads goes on"
        await asyncio.sleep(0.02)
