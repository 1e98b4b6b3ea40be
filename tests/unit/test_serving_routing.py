"""The board: what fronts are told, when all of them follow, and who gets the traffic when nobody watches any more."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import pytest

from rayswift.serving.routing import FRONT_SILENT_S, LEASE_S, Board, Followed, Report, Route, Routing, Target
from rayswift.serving.tallies import Tally

_OLD, _NEW = "0" * 12, "1" * 12
_ROUTE = Route(_OLD, {_OLD: Target("a", "exports/a")}, {_OLD: 1.0})
_BOTH = _ROUTE.beside(_NEW, Target("b", "exports/b"))


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


@pytest.fixture
def board(clock: _Clock) -> Board:
    return Board({"m": _ROUTE}, now_s=clock)


@dataclass
class _Store:
    """What is kept, and whether the disk is full."""

    kept: bytes | None = None
    is_full: bool = False
    written: list[bytes] = field(default_factory=list)

    def read(self) -> bytes | None:
        return self.kept

    def write(self, kept: bytes) -> None:
        if self.is_full:
            raise OSError("no space left")
        self.kept = kept
        self.written.append(kept)


def _following(front: str, told: Routing, **problems: str) -> Report:
    """That of a front which follows what it was told of `m`, or cannot."""
    return Report(front, {"m": Followed(told, problems)})


def _follow(board: Board, *fronts: str) -> Routing:
    for front in fronts:
        told = board.sync(Report(front))["m"]
        board.sync(_following(front, told))
    return told


def test_a_route_is_in_force_once_every_front_that_lives_follows_it(board: Board, clock: _Clock) -> None:
    assert not board.watch("m").in_force  # nobody is there to follow it
    _follow(board, "one", "two")
    assert board.watch("m").in_force
    board.put("m", _BOTH)
    assert not board.watch("m").in_force
    _follow(board, "one")
    assert not board.watch("m").in_force
    clock.now += FRONT_SILENT_S + 1  # the other one has ended
    _follow(board, "one")
    assert board.watch("m").in_force


def test_a_front_that_cannot_follow_says_why(board: Board) -> None:
    first = _follow(board, "one")
    board.put("m", _BOTH.shared(_NEW, 0.5))
    board.sync(_following("one", first, **{_NEW: "an older one"}))
    assert not board.watch("m").problems
    told = board.sync(Report("two"))["m"]
    board.sync(_following("one", told))
    board.sync(_following("two", told, **{_NEW: "no such folder"}))
    seen = board.watch("m")
    assert (seen.in_force, seen.problems) == (False, {_NEW: f"front two cannot open version {_NEW}: no such folder"})
    board.put("m", _ROUTE)  # back again: what was told of the other one is no reason against this one
    assert not board.watch("m").problems


def test_a_version_that_nobody_is_sent_to_keeps_no_route_from_being_in_force(board: Board) -> None:
    board.put("m", _BOTH)
    told = board.sync(Report("one"))["m"]
    board.sync(_following("one", told, **{_NEW: "no such folder"}))
    seen = board.watch("m")
    assert seen.in_force
    assert seen.problems.keys() == {_NEW}
    board.sync(_following("one", told, **{_OLD: "no such folder"}))
    assert not board.watch("m").in_force


def test_a_model_does_not_wait_for_what_becomes_of_another_one() -> None:
    board = Board({"m": _ROUTE, "n": _ROUTE})
    board.put("n", _BOTH.shared(_NEW, 0.5))
    told = board.sync(Report("one"))
    board.sync(Report("one", {"m": Followed(told["m"]), "n": Followed(told["n"], {_NEW: "no such folder"})}))
    assert board.watch("m").in_force
    assert not board.watch("m").problems
    assert not board.watch("n").in_force
    board.put("m", _BOTH)
    assert board.sync(Report("one"))["n"] == told["n"]  # the order of one is none of another's


def test_the_live_version_has_everything_back_when_nobody_renews(board: Board, clock: _Clock) -> None:
    board.put("m", _BOTH.shared(_NEW, 0.25))
    for _ in range(3):
        clock.now += LEASE_S - 1
        assert board.watch("m", renew=True).route.weights == {_OLD: 0.75, _NEW: 0.25}
    clock.now += LEASE_S - 1
    board.watch("m")  # who only looks renews nothing
    clock.now += 2
    told = board.sync(Report("one"))["m"].route
    assert told.weights == {_OLD: 1.0}
    assert told.targets == _BOTH.targets  # it still runs


def test_counts_are_those_of_all_fronts_the_ended_ones_too(board: Board, clock: _Clock) -> None:
    board.sync(Report("one", tallies={"m": {_OLD: Tally(3, 2, 1)}}))
    board.sync(Report("one", tallies={"m": {_OLD: Tally(4, 3, 1)}}))
    clock.now += FRONT_SILENT_S + 1
    board.sync(Report("two", tallies={"m": {_OLD: Tally(10, 10, 0), _NEW: Tally(1, 0, 1)}}))
    seen = board.watch("m").tallies
    assert seen[_OLD] == Tally(14, 13, 1)
    assert seen[_NEW] == Tally(1, 0, 1)


def test_a_board_that_was_started_anew_goes_on_where_the_last_one_was(clock: _Clock) -> None:
    store = _Store()
    board = Board({"m": _ROUTE, "n": _ROUTE}, now_s=clock, store=store)
    assert not store.written
    board.put("m", _BOTH)
    board.put("m", _BOTH.promoted(_NEW).without(_OLD))
    anew = Board({"m": _ROUTE, "n": _ROUTE}, now_s=clock, store=store)
    assert anew.sync(Report("a front that has just begun")) == board.sync(Report("one"))
    assert anew.routes() == {"m": _BOTH.promoted(_NEW).without(_OLD), "n": _ROUTE}


def test_traffic_that_was_shared_when_the_board_ended_is_watched_over_or_taken_back(clock: _Clock) -> None:
    store = _Store()
    Board({"m": _ROUTE}, now_s=clock, store=store).put("m", _BOTH.shared(_NEW, 0.5))
    anew = Board({"m": _ROUTE}, now_s=clock, store=store)
    for _ in range(3):  # who promotes is still there
        clock.now += LEASE_S - 1
        assert anew.watch("m", renew=True).route == _BOTH.shared(_NEW, 0.5)
    anew = Board({"m": _ROUTE}, now_s=clock, store=store)
    clock.now += LEASE_S + 1
    assert anew.sync(Report("one"))["m"].route == _BOTH
    assert Board({"m": _ROUTE}, store=store).routes() == {"m": _BOTH}  # that is kept as well


def test_nobody_is_told_what_could_not_be_kept(clock: _Clock) -> None:
    board = Board({"m": _ROUTE}, now_s=clock, store=(store := _Store()))
    store.is_full = True
    with pytest.raises(OSError, match="no space left"):
        board.put("m", _BOTH)
    assert board.routes() == {"m": _ROUTE}
    store.is_full = False
    board.put("m", _BOTH.shared(_NEW, 0.5))
    store.is_full = True
    clock.now += LEASE_S + 1
    with pytest.raises(OSError, match="no space left"):
        board.sync(Report("one"))
    store.is_full = False
    assert board.sync(Report("one"))["m"].route == _BOTH  # it is tried again


def test_what_another_release_has_kept_is_told_and_learned_from_the_fronts(
    clock: _Clock, caplog: pytest.LogCaptureFixture
) -> None:
    board = Board({"m": _ROUTE}, now_s=clock, store=(store := _Store()))
    board.put("m", _BOTH)
    board.put("m", _BOTH.shared(_NEW, 0.5))
    followed = board.sync(Report("one"))["m"]
    assert store.kept is not None
    for kept in (store.kept.replace(b'"format":1', b'"format":2'), b"\x80", b'{"format":1}'):
        store.kept = kept
        caplog.clear()
        with caplog.at_level(logging.ERROR, "rayswift.serving"):
            anew = Board({"m": _ROUTE}, now_s=clock, store=store)
        assert "is of another release" in caplog.text
        assert anew.routes() == {"m": _ROUTE}
    assert anew.sync(_following("one", followed)) == {"m": followed}
    assert Board({"m": _ROUTE}, store=store).routes() == {"m": followed.route}
    clock.now += LEASE_S + 1  # a promotion that was under way goes on, or is taken back
    assert anew.sync(_following("one", followed))["m"].route == _BOTH


def test_routes_keep_a_version_that_answers() -> None:
    promoted = _BOTH.shared(_NEW, 1.0).promoted(_NEW)
    assert (promoted.live, promoted.weights) == (_NEW, {_NEW: 1.0})
    assert promoted.without(_OLD).targets.keys() == {_NEW}
    assert _BOTH.shared(_NEW, 0.5).without(_NEW) == _ROUTE
    with pytest.raises(AssertionError):
        promoted.without(_NEW)


def test_a_version_that_loses_its_traffic_is_taken_back_unless_the_new_one_replaces_it() -> None:
    shared, last = _BOTH.shared(_NEW, 0.5), _BOTH.shared(_NEW, 1.0)
    promoted = last.promoted(_NEW)
    for before, later in [(shared, shared.without(_NEW)), (last, last.settled()), (promoted, _ROUTE)]:
        assert before.taken_back(later) == [_NEW]
    for before, later in [
        (_ROUTE, shared), (shared, last), (last, promoted), (promoted, promoted.without(_OLD)), (_BOTH, _ROUTE),
    ]:  # fmt: skip
        assert before.taken_back(later) == []


def test_a_revision_that_was_given_twice_is_not_in_force_where_the_first_is_followed(board: Board) -> None:
    followed = _follow(board, "one", "two")
    board.put("m", _BOTH)
    first = board.sync(_following("one", followed))["m"]
    anew = Board({"m": _ROUTE})  # which cannot read what the other has kept, and hears of the second front alone
    anew.sync(_following("two", followed))
    anew.put("m", _BOTH.shared(_NEW, 0.5))
    second = anew.sync(_following("two", followed))["m"]
    anew.sync(_following("two", second))
    assert anew.sync(_following("one", first))["m"] == second != first
    assert second.revision == first.revision
    assert not anew.watch("m").in_force
    anew.sync(_following("one", second))
    assert anew.watch("m").in_force


def test_alone_is_the_live_version() -> None:
    assert _BOTH.shared(_NEW, 0.5).alone() == _ROUTE
