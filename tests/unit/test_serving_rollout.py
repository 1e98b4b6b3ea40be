"""The orders of a promotion and a rollback: in which order they are given, and what is left however one ends.

The board is the real one, with a front that follows it; Ray Serve is a list of applications, and time stands still
but for what the promotion sleeps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import GetTimeoutError, RayTaskError

from rayswift.errors import ConfigError, PromotionError, ServeError
from rayswift.serving import boards, controller, front, registry, replay, rollout
from rayswift.serving.engine import Embedding
from rayswift.serving.facts import Facts
from rayswift.serving.promotion import Policy
from rayswift.serving.questions import Question
from rayswift.serving.registry import EndpointRecord, ModelVersions
from rayswift.serving.rollout import Rollout
from rayswift.serving.routing import LEASE_S, Board, Followed, Report, Route, Target, Watched
from rayswift.serving.spec import ServeSpec
from rayswift.serving.tallies import Tally, counted
from rayswift.serving.versions import version_of

_POLICY = Policy(steps=(0.3, 1.0), step_s=10, min_requests=20)
_FACTS = Facts(64, True, False, None, frozenset({"messages"}))
_QUESTIONS = [Question([{"role": "user", "content": "hello"}], None, 8)]


class _FollowedBoard(Board):
    """A board with one front, which follows it whenever somebody looks, and answers a request per version and look."""

    def __init__(self, world: _World, routes: dict[str, Route]) -> None:
        spec = ServeSpec(models={"m": str(world.home / "a")})
        super().__init__(routes, spec, "e", now_s=world.monotonic)
        self._world, self._followed, self.num_unheard = world, dict[str, Followed](), 0
        self.tallies: dict[str, Tally] = {}

    def put(self, model: str, route: Route) -> None:
        super().put(model, route)
        shares = " ".join(f"{self._world.name(one)}={share:.0%}" for one, share in sorted(route.weights.items()))
        self._world.done.append(f"{shares} of {''.join(sorted(map(self._world.name, route.targets)))}")

    def restarted(self, routes: dict[str, Route]) -> _FollowedBoard:
        """One that Ray has started anew: it hears of no front in the first three calls."""
        board = _FollowedBoard(self._world, routes)
        board._followed, board.num_unheard = self._followed, 3
        return board

    def watch(self, model: str, *, renew: bool = False) -> Watched:
        if self.num_unheard:
            self.num_unheard -= 1
            return super().watch(model, renew=renew)
        told = self.sync(self._report())[model]
        unknown = [one for one in told.route.targets if self._world.name(one) in self._world.cannot_open]
        followed = self._followed[model] = Followed(told, dict.fromkeys(unknown, "no such file"))
        if followed.is_in_force:
            for version in (one for one, share in told.route.weights.items() if share > 0):
                self.tallies[version] = self.tallies.get(version, Tally()) + self._world.answer(version)
        self.sync(self._report())
        return super().watch(model, renew=renew)

    def _report(self) -> Report:
        return Report("front", dict(self._followed), {"m": dict(self.tallies)})


@dataclass
class _World:
    """An endpoint of one model whose version `a` is live, beside the exports `a`, `b` and `c`."""

    home: Path
    done: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    apps: set[str] = field(default_factory=set)
    now: float = 0.0
    cannot_open: set[str] = field(default_factory=set)
    cannot_start: set[str] = field(default_factory=set)
    fails: set[str] = field(default_factory=set)
    hangs: set[str] = field(default_factory=set)
    seconds: dict[str, float] = field(default_factory=dict)
    says: dict[str, Callable[[], str]] = field(default_factory=dict)
    asked: set[tuple[str, str]] = field(default_factory=set)
    follows: dict[str, Callable[[], float]] = field(default_factory=dict)
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    facts: dict[str, Facts] = field(default_factory=dict)
    at_sleep: Callable[[], None] = lambda: None
    drains: bool = False

    def __post_init__(self) -> None:
        for name in "abc":
            (self.home / name).mkdir()
            (self.home / name / "rayswift.json").write_text(json.dumps(name))
        live = self.version("a")
        self.board = _FollowedBoard(self, {"m": Route(live, {live: self.target("a")}, {live: 1.0})})
        self.apps = {"rayswift", self.target("a").app}
        registry.record(self.home, "m", live, self.home / "a", "live")

    def version(self, name: str) -> str:
        return str(version_of(self.home / name))

    def name(self, version: str) -> str:
        return next(name for name in "abc" if self.version(name) == version)

    def target(self, name: str) -> Target:
        return Target(front.app_of("m", self.version(name)), str(self.home / name))

    def known(self) -> ModelVersions:
        return registry.read(self.home).models["m"]

    def states(self) -> dict[str, str]:
        return {self.name(one.id): one.state for one in self.known().versions}

    def route(self) -> tuple[dict[str, float], str]:
        """The share of each version that has one, and all that run."""
        found = self.board.routes()["m"]
        return {self.name(one): share for one, share in found.weights.items()}, "".join(
            sorted(map(self.name, found.targets))
        )

    def opened(self) -> Rollout:
        return Rollout(str(self.home), "m", self.said.append, self.board)

    def promote(
        self,
        name: str,
        policy: Policy = _POLICY,
        *,
        questions: Sequence[Question] = _QUESTIONS,
        keep_old: bool = False,
    ) -> ModelVersions:
        return self.opened().promote(str(self.home / name), policy, questions, keep_old=keep_old)

    def answer(self, version: str) -> Tally:
        if self.name(version) in self.fails:
            return Tally(1, 0, 1)
        if self.name(version) in self.hangs:  # one more that waits, and those of before wait on
            return Tally(1, waits=counted(Tally().waits, self.now))
        took_s = self.seconds.get(self.name(version), 0.2)
        return Tally(1, 1, 0, 0, counted(Tally().first, took_s), counted(Tally().whole, took_s))

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.at_sleep()

    def deploy(self, app: str, application: Any) -> None:
        self.done.append(f"start {self._of(app)}")
        self.apps.add(app)

    def wait_until_running(self, app: str, spec: ServeSpec, what: str) -> None:
        if self._of(app) in self.cannot_start:
            raise ServeError(f"{what} could not start: OutOfMemoryError")

    def delete(self, app: str) -> None:
        self.done.append(f"end {self._of(app)}")
        self.apps.discard(app)
        if self.drains:
            raise TimeoutError("Some of these applications weren't deleted after 60s")

    def handle(self, app: str) -> Any:
        say = self.says.get(self._of(app), lambda: "hi")
        facts = self.facts.get(self._of(app), _FACTS)

        def answer(asked: Any, max_new_tokens: int) -> Any:
            self.asked.add((self._of(app), str(asked)))
            return SimpleNamespace(result=lambda **_: say(), cancel=lambda: None)

        def follows(asked: Any, said: str) -> Any:
            self.asked.add((self._of(app), f"{asked} -> {said}"))
            return SimpleNamespace(result=lambda **_: self.follows[self._of(app)](), cancel=lambda: None)

        return SimpleNamespace(
            answer=SimpleNamespace(remote=answer),
            follows=SimpleNamespace(remote=follows),
            vector=SimpleNamespace(remote=lambda _: SimpleNamespace(result=lambda **_: self.vectors[self._of(app)])),
            facts=SimpleNamespace(remote=lambda: SimpleNamespace(result=lambda **_: facts)),
        )

    def _of(self, app: str) -> str:
        return next((name for name in "abc" if self.target(name).app == app), app)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _World:
    made = _World(tmp_path)
    monkeypatch.setattr(rollout, "time", made)
    monkeypatch.setattr(boards, "asked", lambda method, *arguments, **named: method(*arguments, **named))
    monkeypatch.setattr(front, "version_application", lambda *_: None)
    monkeypatch.setattr(controller, "deploy", made.deploy)
    monkeypatch.setattr(controller, "wait_until_running", made.wait_until_running)
    monkeypatch.setattr(rollout, "_whole", version_of)  # what a whole export is is proved elsewhere
    monkeypatch.setattr(rollout.serve, "status", lambda: SimpleNamespace(applications=set(made.apps)))
    monkeypatch.setattr(rollout.serve, "delete", made.delete)
    monkeypatch.setattr(replay.serve, "get_app_handle", made.handle)
    return made


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_a_promotion_gives_its_orders_one_after_the_other(world: _World) -> None:
    found = world.promote("b")
    assert world.done == [
        "start b", "a=100% of ab", *_ordered(world, "a=70% b=30% of ab", "a=0% b=100% of ab"), "b=100% of ab",
        "b=100% of b", "end a",
    ]  # fmt: skip
    assert (world.states(), found.live, found.previous) == (
        {"a": "retired", "b": "live"}, world.version("b"), world.version("a"),
    )  # fmt: skip
    assert world.now >= 20


def _ordered(world: _World, *puts: str) -> list[str]:
    """The puts, with the shares in the order of the versions' ids, as they are told."""
    first = sorted("ab", key=world.version)
    return [" ".join([*sorted(put.split(" of ")[0].split(), key=lambda one: first.index(one[0])), "of ab"])
            for put in puts]  # fmt: skip


def _lost() -> str:
    raise ServeError("a prompt of 70 tokens leaves no room for an answer")


def _cannot_follow() -> float:
    raise ServeError("a prompt of 70 tokens leaves no room for an answer")


@dataclass(frozen=True)
class _Ending:
    """A way for a promotion of `b` to fail."""

    prepare: Callable[[_World], object]
    reason: str
    kind: type[BaseException] = PromotionError


_ENDINGS = {
    "does not start": _Ending(lambda world: world.cannot_start.add("b"), "could not start: OutOfMemoryError"),
    "takes less": _Ending(lambda world: world.facts.update(b=replace(_FACTS, max_model_len=32)), "32 tokens beside 64"),
    "knows no conversations": _Ending(
        lambda world: world.facts.update(b=replace(_FACTS, chat_takes=frozenset())),
        "it has no chat template, and the live version has one",
    ),
    "has nothing to be compared with": _Ending(
        lambda world: world.says.update(a=_lost),
        "cannot be verified: the live version answers none of the prompts; name rows that it can answer with --prompts",
    ),
    "says nothing": _Ending(lambda world: world.says.update(b=lambda: ""), "empty answer"),
    "says something else throughout": _Ending(
        lambda world: (world.says.update(b=lambda: "7 7 7"), world.follows.update(b=lambda: 0.05)),
        "it would choose 5% of the tokens of the live version's answers, less than --min-token-agreement, 10%",
    ),
    "cannot be followed": _Ending(
        lambda world: (world.says.update(b=lambda: "7 7 7"), world.follows.update(b=_cannot_follow)),
        "1 of 1 answers could not be followed within 60 s",
    ),
    "is to be compared with nothing": _Ending(
        lambda world: world.says.update(a=lambda: "", b=lambda: "hi"),
        "the live version's answers are empty, so that nothing can be compared",
    ),
    "cannot be opened": _Ending(lambda world: world.cannot_open.add("b"), "front front cannot open version"),
    "fails": _Ending(lambda world: world.fails.add("b"), "answers failed"),
    "hangs": _Ending(lambda world: world.hangs.add("b"), "by waiting more than 30 s for a token"),
    "is slow": _Ending(lambda world: world.seconds.update(b=2.0), "p50 to the first token"),
    "interrupted": _Ending(lambda world: setattr(world, "at_sleep", _interrupt), "interrupted", KeyboardInterrupt),
}


@pytest.mark.parametrize("ending", _ENDINGS.values(), ids=_ENDINGS.keys())
def test_however_it_fails_everything_is_as_before_and_the_reason_is_written_down(
    world: _World, ending: _Ending
) -> None:
    before, apps = world.route(), set(world.apps)
    ending.prepare(world)
    with pytest.raises(ending.kind):
        world.promote("b")
    assert (world.route(), world.apps) == (before, apps)
    assert world.states() == {"a": "live", "b": "rolled-back"}
    assert ending.reason in str(world.known().get(world.version("b")).reason)


def test_other_words_are_no_fault_of_a_version_that_would_choose_the_live_ones_tokens_too(world: _World) -> None:
    world.says, world.follows = {"b": lambda: "hello"}, {"b": lambda: 0.6}
    assert world.promote("b").live == world.version("b")
    assert ("b", f"{_QUESTIONS[0].asked} -> hi") in world.asked
    assert "1 prompts answered, 0% as the live version does, 60% token by token" in world.said


def test_right_answers_vouch_for_a_version_and_wrong_ones_do_not(world: _World) -> None:
    asked = [Question([{"role": "user", "content": "2 + 2"}], "4", 8)]
    world.says, world.follows = {"b": lambda: "4"}, {"b": lambda: 0.0}
    assert world.promote("b", questions=asked).live == world.version("b")
    assert "1 prompts answered, 0% as the live version does" in world.said
    world.says["c"] = world.says["b"] = lambda: "5"  # neither is right, which says nothing of either
    world.follows["c"] = lambda: 0.0
    assert world.promote("c", questions=asked).live == world.version("c")  # all as the live one
    world.says["a"], world.follows["a"] = lambda: "6", lambda: 0.02
    with pytest.raises(PromotionError, match="it would choose 2% of the tokens"):
        world.promote("a", questions=asked)
    assert world.promote("a", replace(_POLICY, min_token_agreement=0), questions=asked).live == world.version("a")


def test_a_model_that_embeds_is_asked_for_vectors(world: _World) -> None:
    world.facts = dict.fromkeys("abc", replace(_FACTS, embedding=Embedding(2)))
    world.vectors = {"a": np.array([1.0, 0.0]), "b": np.array([0.0, 1.0]), "c": np.array([0.8, 0.6])}
    with pytest.raises(PromotionError, match=r"mean cosine of 0\.000 to the live"):
        world.promote("b")
    assert world.route() == ({"a": 1.0}, "a")
    assert world.promote("c", replace(_POLICY, min_similarity=0.7)).live == world.version("c")
    assert any("1 prompts answered, with a mean cosine of 0.800" in one for one in world.said)


def test_texts_are_cut_to_what_both_versions_have_room_for(world: _World) -> None:
    world.facts.update(b=replace(_FACTS, max_model_len=128))
    rollout = world.opened()
    assert rollout.live_export == world.target("a").folder
    rollout.promote(str(world.home / "b"), _POLICY, [Question("x" * 1000, None, 8)])
    assert world.asked == {("a", "x" * 32), ("b", "x" * 32)}


def test_who_hangs_at_a_prompt_is_waited_for_by_what_the_live_version_takes(
    world: _World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole answer may take more than the wait for a token, which is 30 s."""
    monkeypatch.setattr(replay, "time", world)

    def takes(seconds: float) -> Callable[[], str]:
        def say() -> str:
            world.now += seconds
            return "hi"

        return say

    def hangs() -> str:
        world.now += 5
        raise TimeoutError

    world.says.update(a=takes(1), b=takes(59))
    world.promote("b")
    for live_s, bound_s in ((1, 60), (20, 80), (500, 600)):  # the last is the time that any request has
        world.says.update(a=hangs, b=takes(live_s))
        began = world.now
        told = f"1 of 1 verification prompts were not answered within {bound_s} s"
        with pytest.raises(PromotionError, match=told):
            world.promote("a")
        assert world.now - began <= live_s + bound_s + 5


def test_interrupted_while_the_fronts_take_the_last_step_it_goes_back(world: _World) -> None:
    put = world.board.put

    def at_the_last(model: str, route: Route) -> None:
        put(model, route)
        if route.live == world.version("b"):
            raise KeyboardInterrupt

    world.board.put = at_the_last  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        world.promote("b")
    assert world.route() == ({"a": 1.0}, "a")
    assert world.states() == {"a": "live", "b": "rolled-back"}


def test_what_cannot_be_written_down_does_not_hide_why_it_went_back(
    world: _World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.fails.add("b")
    record = registry.record

    def full(*arguments: Any) -> ModelVersions:
        if "rolled-back" in arguments:
            raise ConfigError("cannot be written: No space left on device", path="registry")
        return record(*arguments)

    monkeypatch.setattr(registry, "record", full)
    with pytest.raises(PromotionError, match="answers failed"):
        world.promote("b")
    assert world.route() == ({"a": 1.0}, "a")
    assert any("No space left" in one for one in world.said)


def test_the_live_version_is_measured_from_the_beginning_of_the_promotion_on(world: _World) -> None:
    world.seconds.update(a=2.0)
    for _ in range(1000):  # a long and slow night
        world.board.watch("m")
    world.seconds.update(a=0.2, b=1.0)
    with pytest.raises(PromotionError, match="p50 to the first token"):
        world.promote("b")


def test_a_version_that_streams_for_long_ends_later_and_the_promotion_is_done(world: _World) -> None:
    world.drains = True
    assert world.promote("b").live == world.version("b")
    assert any("ends after the answers" in one for one in world.said)


def test_a_kept_version_ends_with_the_next_promotion_and_goes_back_at_once(world: _World) -> None:
    world.promote("b", keep_old=True)
    assert world.route() == ({"b": 1.0}, "ab")
    world.done.clear()
    assert world.opened().roll_back().live == world.version("a")
    assert world.done == ["a=100% of ab", "a=100% of a", "end b"]
    assert world.states() == {"a": "live", "b": "rolled-back"}
    world.promote("b", keep_old=True)
    world.promote("c", keep_old=True)
    assert world.route() == ({"c": 1.0}, "bc")


def test_a_kept_version_that_is_promoted_again_and_fails_does_not_stay_without_an_application(world: _World) -> None:
    world.promote("b", keep_old=True)
    world.fails.add("a")
    with pytest.raises(PromotionError):
        world.promote("a")
    assert world.route() == ({"b": 1.0}, "b")
    assert world.target("a").app not in world.apps


def test_a_rollback_that_fails_leaves_everything_as_it_was(world: _World) -> None:
    world.promote("b")
    for broken in (world.cannot_start, world.cannot_open):
        broken.add("a")
        with pytest.raises(PromotionError):
            world.opened().roll_back()
        assert world.route() == ({"b": 1.0}, "b")
        assert world.apps == {"rayswift", world.target("b").app}
        assert world.states() == {"a": "retired", "b": "live"}
        broken.clear()
    assert world.opened().roll_back().live == world.version("a")
    with pytest.raises(ConfigError, match="no version before the live one"):
        world.opened().roll_back()


def test_the_live_version_is_not_promoted(world: _World) -> None:
    with pytest.raises(ConfigError, match="which is live already"):
        world.promote("a")
    assert world.states() == {"a": "live"}


def test_what_a_killed_promotion_left_is_ended_by_the_next_one(world: _World) -> None:
    other = front.app_of("another model", world.version("b"))  # which is being promoted too
    world.apps |= {world.target("b").app, world.target("c").app, other}
    registry.record(world.home, "m", world.version("b"), world.home / "b", "candidate")
    world.board.put("m", world.board.routes()["m"].beside(world.version("b"), world.target("b")))
    world.opened()
    assert world.route() == ({"a": 1.0}, "a")
    assert world.apps == {"rayswift", world.target("a").app, other}
    assert world.states() == {"a": "live", "b": "rolled-back"}


def test_killed_before_the_last_step_was_written_down_the_next_one_writes_it(world: _World) -> None:
    registry.record(world.home, "m", world.version("b"), world.home / "b", "candidate")
    both = world.board.routes()["m"].beside(world.version("b"), world.target("b"))
    world.board.put("m", both.promoted(world.version("b")))
    world.apps.add(world.target("b").app)
    world.opened()
    assert world.states() == {"a": "retired", "b": "live"}
    assert world.opened().roll_back().live == world.version("a")


def test_a_route_that_the_board_has_taken_back_before_it_was_followed_is_not_promoted(
    world: _World, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = world.board.put

    def for_too_long(model: str, route: Route) -> None:
        put(model, route)
        if len(route.weights) > 1:
            world.now += LEASE_S + 1

    monkeypatch.setattr(world.board, "put", for_too_long)
    with pytest.raises(PromotionError, match="the traffic was given back"):
        world.promote("b")
    assert world.route() == ({"a": 1.0}, "a")
    assert world.states() == {"a": "live", "b": "rolled-back"}


def test_a_candidate_that_a_front_cannot_open_is_given_no_traffic(world: _World) -> None:
    world.cannot_open.add("b")
    with pytest.raises(PromotionError, match=f"front front cannot open version {world.version('b')}: no such file"):
        world.promote("b")
    assert world.done == ["start b", "a=100% of ab", "a=100% of a", "end b"]


def test_a_kept_version_that_cannot_be_opened_any_more_stops_nothing_and_is_dropped(world: _World) -> None:
    world.promote("b", keep_old=True)
    under_way = world.opened()
    world.cannot_open.add("a")
    assert under_way.promote(str(world.home / "c"), _POLICY, _QUESTIONS, keep_old=True).live == world.version("c")
    assert world.route() == ({"c": 1.0}, "bc")  # the one before the last has ended
    world.cannot_open.add("b")
    world.opened()
    assert world.route() == ({"c": 1.0}, "c")
    assert world.target("b").app not in world.apps
    told = f"ending {world.version('b')}: front front cannot open version {world.version('b')}: no such file"
    assert told in world.said
    world.cannot_open.clear()
    assert world.opened().roll_back().live == world.version("b")  # which is started for it


def test_a_kept_version_whose_application_is_gone_is_dropped(world: _World) -> None:
    world.promote("b", keep_old=True)
    world.apps.discard(world.target("a").app)
    world.opened()
    assert world.route() == ({"b": 1.0}, "b")
    assert f"ending {world.version('a')}: {world.target('a').app} does not run any more" in world.said


def test_the_board_of_another_endpoint_is_not_taken_for_the_own_one(
    world: _World, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = EndpointRecord(id="e", address="127.0.0.1:1", url="http://127.0.0.1:8000/v1", pid=1)
    monkeypatch.setattr(boards, "board", lambda: world.board)
    assert boards.board_of(record) is world.board
    with pytest.raises(ServeError, match=r"127\.0\.0\.1:8000/v1 \(process 1\) does not run any more"):
        boards.board_of(record.model_copy(update={"id": "another"}))


def test_the_traffic_stays_shared_while_prompts_are_answered_slowly(world: _World) -> None:
    def slowly() -> str:
        if (sharing := "b" in world.route()[0]) and world.now < asked_at[0] + 3 * LEASE_S:
            world.now += LEASE_S / 2
            world.board.sync(Report("front"))
            raise GetTimeoutError("not yet")
        asked_at[0] = world.now if sharing else 0.0
        return "hi"

    asked_at = [0.0]
    world.says.update(b=slowly)
    world.promote("b")
    assert "a=100% of ab" not in world.done[2:]
    assert world.now > 3 * LEASE_S


def test_a_prompt_that_fails_or_takes_too_long_is_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, cancelled = SimpleNamespace(now=0.0), list[bool]()

    def late() -> str:
        clock.now += 40
        raise TimeoutError

    def wrong() -> str:
        raise RayTaskError("answer", "traceback", TimeoutError("its own")).as_instanceof_cause()

    monkeypatch.setattr(replay, "time", SimpleNamespace(monotonic=lambda: clock.now))
    asked = replay.Replay([], 60, lambda _: None, meanwhile=lambda: None)
    for say, times in ((late, 80), (wrong, 80)):
        response = SimpleNamespace(result=lambda say=say, **_: say(), cancel=lambda: cancelled.append(True))
        assert asked._result(response, 60) is None
        assert clock.now == times
    assert cancelled == [True]


def test_a_board_that_was_started_anew_is_believed_once_the_fronts_have_told_it(world: _World) -> None:
    """Until then it has the route of the endpoint's start, by which the live version would be nobody's."""
    first = world.board.routes()["m"]
    world.promote("b")
    world.board = world.board.restarted({"m": first})
    world.opened()
    assert world.route() == ({"b": 1.0}, "b")
    assert world.target("b").app in world.apps
    assert world.states()["b"] == "live"


def test_exports_of_another_folder_are_not_this_models(world: _World, tmp_path: Path) -> None:
    """Its lock and its registry are those of the folder, and another process may have the model's own."""
    with pytest.raises(ConfigError, match=r"is not where the exports of m lie") as caught:
        Rollout(str(tmp_path / "a"), "m", world.said.append, world.board)
    assert str(world.home) in str(caught.value)
