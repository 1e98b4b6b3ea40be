"""A front and the board it follows: what it does while a version opens, and when one cannot be opened."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.exceptions import RayServeException

from rayswift.errors import ConfigError, ServeError
from rayswift.serving import front, registry
from rayswift.serving.engine import Embedding, FakeEngine
from rayswift.serving.front import FrontReplica
from rayswift.serving.registry import EndpointRecord
from rayswift.serving.routing import Board, Report, Route, Routing, Target
from rayswift.serving.spec import ServeSpec
from rayswift.serving.traffic import CountedEngine

_OLD, _NEW = "0" * 12, "1" * 12
_ROUTE = Route(_OLD, {_OLD: Target("a", "exports/a")}, {_OLD: 1.0})
_BOTH = _ROUTE.beside(_NEW, Target("b", "exports/b"))


class _Front(FrontReplica):
    def __del__(self) -> None:  # type: ignore[override]  # the collector awaits nothing
        for task in self._tasks:
            assert task.done()


@dataclass
class _World:
    """A board in this process, and what becomes of opening each folder."""

    board: Board = field(default_factory=lambda: Board({"m": _ROUTE}))
    open: Callable[[str], Awaitable[None]] | None = None
    heard: list[Report] = field(default_factory=list)

    def sync(self, report: Report) -> Any:
        async def answered() -> Mapping[str, Routing]:
            self.heard.append(report)
            return self.board.sync(report)

        return answered()

    async def started(self, spec: ServeSpec, folder: str, engine: CountedEngine) -> Any:
        if self.open is not None:
            await self.open(folder)
        return SimpleNamespace(engine=CountedEngine(FakeEngine()), version=folder, check=lambda: None)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> _World:
    made = _World()
    monkeypatch.setattr(front, "board", lambda: SimpleNamespace(sync=SimpleNamespace(remote=made.sync)))
    monkeypatch.setattr(front.serve, "get_app_handle", lambda app: None)
    monkeypatch.setattr(front, "started", made.started)
    monkeypatch.setattr(front, "_SYNC_S", 0.01)
    monkeypatch.setattr(front.gc, "freeze", lambda: None)
    return made


def _run(world: _World, scenario: Callable[[_Front], Awaitable[None]]) -> None:
    async def whole() -> None:
        made: Any = _Front.__new__(_Front)
        await made.__init__(ServeSpec(models=dict.fromkeys(world.board.routes(), "exports/a")))
        try:
            await scenario(made)
        finally:
            await FrontReplica.__del__(made)
            await asyncio.gather(*made._tasks, return_exceptions=True)

    asyncio.run(whole())


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def _broken(folder: str) -> None:
    if folder == "exports/b":
        raise RayServeException("Application 'b' does not exist.")


def test_a_front_goes_on_as_before_and_says_what_it_cannot_open(world: _World) -> None:
    async def scenario(made: _Front) -> None:
        world.open = _broken
        world.board.put("m", _BOTH.shared(_NEW, 0.5))
        await _until(lambda: bool(world.board.watch("m").problems))
        seen = world.board.watch("m")
        assert not seen.in_force
        assert seen.problems[_NEW].endswith(f"version {_NEW}: RayServeException: Application 'b' does not exist.")
        assert seen.problems[_NEW].startswith(f"front {os.getpid()}@")
        assert {made._models["m"].pick(None).version for _ in range(4)} == {"exports/a"}
        await made.check_health()  # a version of no use is no reason to replace it
        world.open = None
        await _until(lambda: world.board.watch("m").in_force)
        assert {made._models["m"].pick(None).version for _ in range(4)} == {"exports/a", "exports/b"}

    _run(world, scenario)


def test_a_version_that_nobody_is_sent_to_and_that_cannot_be_opened_is_left_out(world: _World) -> None:
    async def scenario(made: _Front) -> None:
        world.open = _broken
        third = "2" * 12
        world.board.put("m", _BOTH.beside(third, Target("c", "exports/c")).shared(third, 0.5))
        await _until(lambda: world.board.watch("m").in_force)
        assert world.board.watch("m").problems.keys() == {_NEW}
        routed = made._models["m"]
        assert {routed.pick(None).version for _ in range(4)} == {"exports/a", "exports/c"}
        num_heard = len(world.heard)
        await _until(lambda: len(world.heard) > num_heard + 3)
        assert made._models["m"] is routed  # while it is tried again, everybody has his turn
        world.open = None
        await _until(lambda: not world.board.watch("m").problems)
        assert made._models["m"].pick(_NEW).version == "exports/b"

    _run(world, scenario)


def test_a_model_that_cannot_be_followed_keeps_no_other_one_from_it(world: _World) -> None:
    async def scenario(made: _Front) -> None:
        async def hangs(folder: str) -> None:
            if folder == "exports/b":
                await asyncio.Event().wait()

        for world.open in (_broken, hangs):
            world.board.put("n", _BOTH.shared(_NEW, 0.5))
            world.board.put("m", _ROUTE.beside("2" * 12, Target("c", "exports/c")).promoted("2" * 12))
            await _until(lambda: world.board.watch("m").in_force)
            assert made._models["m"].pick(None).version == "exports/c"
            assert not world.board.watch("n").in_force
            assert made._models["n"].pick(None).version == "exports/a"
            world.board.put("m", _ROUTE)
            await _until(lambda: world.board.watch("m").in_force)
        world.board.put("n", _ROUTE)  # while the other version is still being opened
        await _until(lambda: world.board.watch("n").in_force)

    world.board = Board({"m": _ROUTE, "n": _ROUTE})
    _run(world, scenario)


def test_a_front_is_heard_while_it_opens_a_version_and_is_waited_for(world: _World) -> None:
    async def scenario(made: _Front) -> None:
        gate = asyncio.Event()

        async def slow(folder: str) -> None:
            await gate.wait()

        world.open = slow
        world.board.put("m", _BOTH)
        num_heard = len(world.heard)
        await _until(lambda: len(world.heard) > num_heard + 3)
        assert not world.board.watch("m").in_force
        gate.set()
        await _until(lambda: world.board.watch("m").in_force)

    _run(world, scenario)


def test_what_hangs_in_a_version_that_is_taken_back_is_given_up(world: _World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "_PATIENCE_S", 0.01)

    async def scenario(made: _Front) -> None:
        world.board.put("m", _BOTH.shared(_NEW, 0.5))
        await _until(lambda: world.board.watch("m").in_force)
        engine = made._opened["m"][_NEW].engine
        assert isinstance(engine, CountedEngine)
        assert isinstance(engine.inner, FakeEngine)
        engine.inner.gate, engine.inner.embedding = asyncio.Event(), Embedding(2)
        asked = asyncio.create_task(engine.embed([1]))
        await _until(lambda: engine.tally.running == 1)
        world.board.put("m", _BOTH.shared(_NEW, 0.9))
        await _until(lambda: world.board.watch("m").in_force)
        assert not asked.done()
        world.board.put("m", _ROUTE)
        with pytest.raises(ServeError, match="was given up"):
            await asyncio.wait_for(asked, 10)

    _run(world, scenario)


def test_a_front_that_starts_answers_without_what_a_promotion_has_left(
    world: _World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "_OPEN_TIMEOUT_S", 0.05)
    world.board.put("m", _BOTH.shared(_NEW, 0.5))

    async def without_replicas(folder: str) -> None:
        if folder == "exports/b":
            await asyncio.Event().wait()

    world.open = without_replicas

    async def scenario(made: _Front) -> None:
        assert made._models["m"].pick(None).version == "exports/a"
        await _until(lambda: bool(world.board.watch("m").problems))
        assert "exports/b could not be opened within 0.05 s" in world.board.watch("m").problems[_NEW]
        assert not world.board.watch("m").in_force
        assert world.board.routes() == {"m": _BOTH.shared(_NEW, 0.5)}  # the board does not learn from it
        world.open = None
        await _until(lambda: world.board.watch("m").in_force)

    _run(world, scenario)


def test_a_front_without_the_live_version_does_not_start(world: _World) -> None:
    async def broken(folder: str) -> None:
        raise KeyError("added_tokens")

    async def scenario(made: _Front) -> None:
        raise AssertionError("it has started")

    world.open = broken
    with pytest.raises(ServeError, match="KeyError: 'added_tokens'"):
        _run(world, scenario)


def test_an_endpoint_says_at_once_what_its_folder_has_against_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder := tmp_path / "v1").mkdir()
    (folder / "rayswift.json").write_text("{}")
    exports = {"m": str(folder), "n": str(folder)}
    mine = EndpointRecord(id="e", address="127.0.0.1:1", url="http://127.0.0.1:8000/v1", pid=os.getpid())
    front._check_homes(exports, mine)
    assert not capsys.readouterr().err
    registry.record(tmp_path, "m", _NEW, tmp_path / "v2", "live")
    front._check_homes(exports, mine)
    registry.record(tmp_path, "n", _NEW, tmp_path / "v2", "live")
    front._check_homes(exports, mine)
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(" is served")[0] for line in told] == ["note: m", "note: m", "note: n"]
    assert all(f"{_NEW} was live in {tmp_path}" in line for line in told)
    registry.write_endpoint(tmp_path, mine.model_copy(update={"id": "another", "url": "http://127.0.0.1:8001/v1"}))
    front._check_homes(exports, mine)
    told = capsys.readouterr().err.splitlines()
    stale = f"note: {tmp_path} was served at http://127.0.0.1:8001/v1, which does not run any more"
    assert [line.startswith(stale) for line in told] == [True, False, False]  # once, however many models lie there
    with registry.locked(tmp_path), pytest.raises(ConfigError, match="another promotion or rollback"):
        front._check_homes(exports, mine)
