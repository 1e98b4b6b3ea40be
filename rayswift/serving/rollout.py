"""A new version of a model beside the old one, step by step, and back again: the orders of a promotion as it runs.

Knows the board, the applications and the registry. When a step passes is decided in `serving/promotion.py`, and what
fronts do with a route is known by `serving/front.py`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from rayswift.cluster.session import session
from rayswift.errors import ConfigError, ExportError, PlanError, PromotionError, RaySwiftError, ServeError
from rayswift.export.manifest import read_valid
from rayswift.serving import boards, controller, front, process, registry
from rayswift.serving.promotion import Hold, Policy, RollBack, Window
from rayswift.serving.questions import Question
from rayswift.serving.registry import ModelVersions, State
from rayswift.serving.replay import Replay, Say
from rayswift.serving.routing import Route, Target, Watched
from rayswift.serving.spec import ServeSpec
from rayswift.serving.tallies import Tally
from rayswift.serving.versions import version_of

_POLL_S, _SETTLE_S, _FOLLOW_TIMEOUT_S = 0.25, 10.0, 120.0
_GIVEN_BACK = "the traffic was given back, for this process was not heard of in time"
_LOST = (RayError, RayServeException, RaySwiftError)


@contextmanager
def opened(home: str, model: str | None, say: Say) -> Iterator[Rollout]:
    """The versions of a model that is served from the exports in `home`, which nobody else changes meanwhile.

    Raises ConfigError for a folder or model that is not served, ServeError where the endpoint has ended.
    """
    record = registry.read_endpoint(home)
    if record is None:
        raise ConfigError("has no endpoint that says it serves exports from here", path="exports", value=home,
                          fix="start it with `rayswift serve --promotable EXPORT`, or name the folder of the exports "
                              "that are served")  # fmt: skip
    with registry.locked(home):
        try:
            # In this order: Ray takes the signals when it is joined, and a promotion has to go back.
            with session(record.address, token=record.token), process.told_to_stop():
                logging.getLogger("ray.serve").setLevel(logging.WARNING)
                yield Rollout(home, model, say, boards.board_of(record))
        except PlanError as error:
            raise boards.ended(record) from error


class Rollout:
    """One model of a running endpoint, whose versions are changed by this process alone."""

    def __init__(self, home: str, model: str | None, say: Say, board: Any) -> None:
        self._home, self._say, self._board = home, say, board
        self._model = _chosen(model, list(boards.asked(self._board.routes)))
        self._spec: ServeSpec = boards.asked(self._board.spec)
        if (own := registry.home_of(self._spec.models[self._model])) != os.path.realpath(home):
            raise ConfigError(f"is not where the exports of {self._model} lie", path="exports", value=home,
                              fix=f"name {own}, or an export in it")  # fmt: skip
        self._settle()
        self._sweep()

    @property
    def live_export(self) -> str:
        """The folder of the live version."""
        route = self._watch().route
        return route.targets[route.live].folder

    def promote(
        self, export: str, policy: Policy, questions: Sequence[Question], *, keep_old: bool = False
    ) -> ModelVersions:
        """Start an export beside the live version, judge it, and give it the traffic step by step.

        Raises ExportError for a folder that is no whole export, ConfigError for the live version itself, and
        PromotionError when it was not good enough; whatever is raised, the live version has all the traffic again.
        """
        version, route = _whole(export), self._watch().route
        if version == route.live:
            raise ConfigError(f"is version {version}, which is live already", path="EXPORT", value=export,
                              fix="name another export")  # fmt: skip
        target = Target(front.app_of(self._model, version), str(Path(export).resolve()))
        self._record(version, target.folder, "candidate")
        try:
            self._start(version, target)
            replay = Replay(questions, self._spec.request_timeout_s, self._say, meanwhile=self._watch)
            replay.compare(route.targets[route.live], target)
            replay.hear(route.targets[route.live])
            replay.judge(target, policy)
            both = route.beside(version, target)
            self._put(both, version)
            live_before = self._watch().tallies.get(route.live, Tally())
            for share in policy.steps:
                self._step(both.shared(version, share), version, policy, live_before)
                replay.judge(target, policy)
            self._put(both.promoted(version))
            versions = self._record(version, target.folder, "live", f"promoted in {len(policy.steps)} steps")
        except BaseException as error:
            self._go_back(route, version, target, _reason(error))
            raise
        self._say(f"{version} is live")
        kept = {version, route.live} if keep_old else {version}
        for other in route.targets.keys() - kept:
            self._end(other)
        return versions

    def roll_back(self) -> ModelVersions:
        """Give all traffic to the version before the live one at once. Raises ConfigError where there is none."""
        known, route = self._known(), self._watch().route
        previous = known.previous
        if previous is None or previous == route.live or known.get(previous).state == "rolled-back":
            raise ConfigError("has no version before the live one to go back to", path="model", value=self._model,
                              fix="promote the export that should answer")  # fmt: skip
        target = route.targets.get(previous) or self._target_of(previous, known)
        bad, bad_folder, is_running = route.live, route.targets[route.live].folder, previous in route.targets
        try:
            if not is_running:
                self._start(previous, target)
            self._put(route.beside(previous, target).promoted(previous))
        except BaseException:
            self._restore(route, None if is_running else target)
            raise
        self._record(previous, target.folder, "live", f"rolled back from {bad}")
        versions = self._record(bad, bad_folder, "rolled-back", "by hand")
        self._say(f"{previous} is live")
        self._end(bad)
        return versions

    def _target_of(self, version: str, known: ModelVersions) -> Target:
        folder = str((Path(self._home) / known.get(version).folder).resolve())
        if _whole(folder) != version:
            raise ExportError(f"is not version {version} any more", path=folder, fix="promote another export")
        return Target(front.app_of(self._model, version), folder)

    def _start(self, version: str, target: Target) -> None:
        self._say(f"starting {version} from {target.folder}")
        application = front.version_application(self._spec, self._model, target.folder)
        controller.deploy(target.app, application)
        try:
            controller.wait_until_running(target.app, self._spec, what=f"version {version}")
        except ServeError as error:
            raise PromotionError(str(error)) from error

    def _step(self, route: Route, version: str, policy: Policy, live_before: Tally) -> None:
        """Returns when the version has kept to the policy at this share. Raises PromotionError when it has not."""
        self._put(route)
        began, start = time.monotonic(), self._watch().tallies
        self._say(f"{version} has {route.weights[version]:.0%} of the traffic")
        is_told = False
        while True:
            seen = self._watch()
            if seen.route.weights != route.weights:
                raise PromotionError(_GIVEN_BACK)
            mine = seen.tallies.get(version, Tally()) - start.get(version, Tally())
            live = seen.tallies.get(route.live, Tally())
            beside = live - start.get(route.live, Tally())
            window = Window(time.monotonic() - began, mine, live - live_before, live_before, beside)
            decision = policy.decide(window)
            if isinstance(decision, RollBack):
                raise PromotionError(decision.reason)
            if isinstance(decision, Hold):
                if decision.needs_requests and not is_told:
                    self._say(f"waiting for traffic: {mine.ended} of {policy.min_requests} answers")
                    is_told = True
                time.sleep(_POLL_S)
                continue
            but = f"; could not judge {decision.unjudged}" if decision.unjudged else ""
            self._say(f"passed: {mine.answered} answered, {mine.failed} failed in {window.elapsed_s:.0f} s{but}")
            return

    def _go_back(self, route: Route, version: str, target: Target, reason: str) -> None:
        """The live version has everything, the candidate ends, and that is written down. Raises nothing of its own."""
        self._say(f"rolling back {version}: {reason}")
        self._restore(route.without(version), target)
        try:
            self._record(version, target.folder, "rolled-back", reason)
            self._record_live(route)
        except RaySwiftError as error:
            self._say(f"it could not be written down: {error}")

    def _restore(self, route: Route, ending: Target | None) -> None:
        """Route by this again. What fails here is told, and tried by the next promotion."""
        try:
            self._put(route)
            if ending is not None:
                self._delete(ending)
        except _LOST as error:
            self._say(f"the endpoint could not be told: {error}; its board gives the traffic back within 30 s")

    def _end(self, version: str) -> None:
        """A version that nobody is sent to any more ends, once its last answer has. Where it cannot, that is told."""
        route = self._watch().route
        try:
            self._put(route.without(version))
            self._delete(route.targets[version])
        except _LOST as error:
            self._say(f"{version} could not be ended: {error}; it is tried again after the next promotion")

    def _put(self, route: Route, *more: str) -> None:
        """Returns when every front follows. Raises PromotionError where one cannot open what this needs, or `more`."""
        boards.asked(self._board.put, self._model, route)
        deadline, needed = time.monotonic() + _FOLLOW_TIMEOUT_S, route.needed.union(more)
        while True:
            seen = self._watch()
            if seen.route != route:
                raise PromotionError(_GIVEN_BACK)
            for version in needed & seen.problems.keys():
                raise PromotionError(seen.problems[version])
            if seen.in_force:
                return
            if time.monotonic() > deadline:
                raise PromotionError(f"the fronts did not follow within {_FOLLOW_TIMEOUT_S:g} s")
            time.sleep(_POLL_S)

    def _watch(self) -> Watched:
        seen: Watched = boards.asked(self._board.watch, self._model, renew=True)
        return seen

    def _delete(self, target: Target) -> None:
        if target.app not in serve.status().applications:
            return
        try:
            serve.delete(target.app)
            self._say(f"{target.app} has ended")
        except TimeoutError:  # Serve waits a minute for it, and a stream may take longer
            self._say(f"{target.app} ends after the answers that it still gives")

    def _settle(self) -> None:
        """Returns when the fronts route as the board says, or had the time to tell one that Ray has started anew."""
        deadline = time.monotonic() + _SETTLE_S
        while not self._watch().in_force and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _sweep(self) -> None:
        """End what a killed promotion has left: a candidate beside the live version, and applications of no route."""
        self._drop_what_cannot_be_opened()
        route = self._watch().route
        for version in self._known().versions:
            if version.state == "candidate" and version.id != route.live:
                if version.id in route.targets:
                    self._end(version.id)
                self._record(version.id, str(Path(self._home) / version.folder), "rolled-back", "its promotion ended")
        self._record_live(route)
        kept = {target.app for target in self._watch().route.targets.values()}
        for name in serve.status().applications:
            if name.startswith(front.app_of(self._model, "")) and name not in kept:
                self._say(f"ending {name}, which a promotion has left behind")
                self._delete(Target(name, ""))

    def _drop_what_cannot_be_opened(self) -> None:
        """A version that nobody is sent to, and without which every front routes already, is not kept any longer."""
        seen, running = self._watch(), serve.status().applications
        for version, target in seen.route.targets.items():
            if version not in seen.route.needed and (version in seen.problems or target.app not in running):
                self._say(f"ending {version}: {seen.problems.get(version, f'{target.app} does not run any more')}")
                self._end(version)

    def _record_live(self, route: Route) -> None:
        """Have the registry say which version answers, where somebody was killed before he wrote it down."""
        if self._known().live != route.live:
            self._record(route.live, route.targets[route.live].folder, "live", "is what the endpoint answers with")

    def _known(self) -> ModelVersions:
        return registry.read(self._home).models.get(self._model, ModelVersions())

    def _record(self, version: str, folder: str, state: State, reason: str | None = None) -> ModelVersions:
        return registry.record(self._home, self._model, version, folder, state, reason)


def _chosen(model: str | None, known: list[str]) -> str:
    if model is None and len(known) == 1:
        return known[0]
    fix = f"use one of {', '.join(known)}"
    if model is None:
        raise ConfigError("has to be named: there are several", path="--model", fix=fix)
    if model not in known:
        raise ConfigError("is not a model of this endpoint", path="--model", value=model, fix=fix)
    return model


def _whole(export: str) -> str:
    """The version of an export whose files are all as its manifest says. Raises ExportError for any other folder."""
    read_valid(export)
    return str(version_of(export))


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return str(error) if isinstance(error, RaySwiftError) else f"{type(error).__name__}: {error}"
