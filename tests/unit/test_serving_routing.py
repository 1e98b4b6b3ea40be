"""The board: what fronts are told, when all of them follow, and who gets the traffic when nobody watches any more."""

from __future__ import annotations

import pytest

from rayswift.serving.routing import FRONT_SILENT_S, LEASE_S, Board, Problem, Report, Route, Target
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


def _follow(board: Board, *fronts: str) -> None:
    for front in fronts:
        board.sync(Report(front, board.sync(Report(front))))


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
    board.put("m", _BOTH)
    told = board.sync(Report("one", problem=Problem(1, "m", "an older one")))
    assert board.watch("m").problem is None
    board.sync(Report("one", problem=Problem(told.revision, "m", "no such folder")))
    seen = board.watch("m")
    assert (seen.in_force, seen.problem) == (False, "no such folder")
    board.sync(Report("one", problem=Problem(told.revision, "another", "no such folder")))
    assert board.watch("m").problem is None  # that is a matter of who promotes the other model
    board.put("m", _ROUTE)  # back again: what was told of the other one is no reason against this one
    assert board.watch("m").problem is None


def test_the_live_version_has_everything_back_when_nobody_renews(board: Board, clock: _Clock) -> None:
    board.put("m", _BOTH.shared(_NEW, 0.25))
    for _ in range(3):
        clock.now += LEASE_S - 1
        assert board.watch("m", renew=True).route.weights == {_OLD: 0.75, _NEW: 0.25}
    clock.now += LEASE_S - 1
    board.watch("m")  # who only looks renews nothing
    clock.now += 2
    told = board.sync(Report("one"))
    assert told.routes["m"].weights == {_OLD: 1.0}
    assert told.routes["m"].targets == _BOTH.targets  # it still runs


def test_counts_are_those_of_all_fronts_the_ended_ones_too(board: Board, clock: _Clock) -> None:
    board.sync(Report("one", tallies={"m": {_OLD: Tally(3, 2, 1)}}))
    board.sync(Report("one", tallies={"m": {_OLD: Tally(4, 3, 1)}}))
    clock.now += FRONT_SILENT_S + 1
    board.sync(Report("two", tallies={"m": {_OLD: Tally(10, 10, 0), _NEW: Tally(1, 0, 1)}}))
    seen = board.watch("m").tallies
    assert seen[_OLD] == Tally(14, 13, 1)
    assert seen[_NEW] == Tally(1, 0, 1)


def test_a_board_that_was_started_anew_learns_from_the_fronts(board: Board, clock: _Clock) -> None:
    board.put("m", _BOTH)
    board.put("m", _BOTH.shared(_NEW, 0.5))
    followed = board.sync(Report("one"))
    anew = Board({"m": _ROUTE}, now_s=clock)
    assert anew.sync(Report("one", followed)) == followed
    clock.now += LEASE_S + 1  # a promotion that was under way goes on, or is taken back
    assert anew.sync(Report("one", followed)).routes["m"].weights == {_OLD: 1.0}


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
    followed = board.sync(Report("one"))
    board.sync(Report("two", followed))
    board.put("m", _BOTH)
    first = board.sync(Report("one", followed))
    anew = Board({"m": _ROUTE})  # died before the second front had heard
    anew.sync(Report("two", followed))
    anew.put("m", _BOTH.shared(_NEW, 0.5))
    second = anew.sync(Report("two", followed))
    anew.sync(Report("two", second))
    assert anew.sync(Report("one", first)) == second != first
    assert not anew.watch("m").in_force
    anew.sync(Report("one", second))
    assert anew.watch("m").in_force


def test_alone_is_the_live_version() -> None:
    assert _BOTH.shared(_NEW, 0.5).alone() == _ROUTE
