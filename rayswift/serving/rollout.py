"""A new version of a model beside the old one, step by step, and back again: the orders of a promotion as it runs.

Knows the board, the applications and the registry. When a step passes is decided in `serving/promotion.py`, and what
fronts do with a route is known by `serving/front.py`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from rayswift.cluster.session import session
from rayswift.errors import ConfigError, ExportError, PlanError, PromotionError, RaySwiftError, ServeError
from rayswift.export.manifest import read_valid
from rayswift.serving import controller, front, process, registry
from rayswift.serving.promotion import Hold, Policy, RollBack, Window
from rayswift.serving.questions import Question
from rayswift.serving.registry import ModelVersions, State
from rayswift.serving.replay import Replay, Say
from rayswift.serving.routing import Route, Target, Watched
from rayswift.serving.spec import ServeSpec
from rayswift.serving.traffic import Tally
from rayswift.serving.versions import version_of

_POLL_S, _FOLLOW_TIMEOUT_S, _CALL_TIMEOUT_S = 0.25, 120.0, 60.0


@contextmanager
def opened(home: str, model: str | None, say: Say) -> Iterator[Rollout]:
    """The versions of a model that is served from the exports in `home`, which nobody else changes meanwhile.

    Raises ConfigError for a folder or model that is not served, ServeError where the endpoint has ended.
    """
    record = registry.read_endpoint(home)
    if record is None:
        raise ConfigError("has no endpoint that says it serves exports from here", path="exports", value=home,
                          fix="start it with `rayswift serve --promotable EXPORT`")  # fmt: skip
    with registry.locked(home):
        try:
            # In this order: Ray takes the signals when it is joined, and a promotion has to go back.
            with session(record.address, token=record.token), process.told_to_stop():
                logging.getLogger("ray.serve").setLevel(logging.WARNING)
                yield Rollout(home, model, say)
        except PlanError as error:
            raise ServeError(f"the endpoint at {record.url} (process {record.pid}) does not run any more",
                             fix="start it again with `rayswift serve --promotable`") from error  # fmt: skip


class Rollout:
    """One model of a running endpoint, whose versions are changed by this process alone."""

    def __init__(self, home: str, model: str | None, say: Say) -> None:
        self._home, self._say, self._board = home, say, front.board()
        routes = self._ask(self._board.routes)
        self._model = _chosen(model, list(routes))
        self._spec: ServeSpec = self._ask(self._board.spec)
        self._sweep(routes)

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
            replay = Replay(questions, self._spec.request_timeout_s, self._say)
            replay.hear(route.targets[route.live])
            replay.judge(target, policy)
            self._put(route.beside(version, target))
            for share in policy.steps:
                self._step(route.beside(version, target).shared(version, share), version, policy)
                replay.judge(target, policy)
        except BaseException as error:
            self._go_back(route, version, target, _reason(error))
            raise
        self._put(route.beside(version, target).promoted(version))
        versions = self._record(version, target.folder, "live", f"promoted in {len(policy.steps)} steps")
        self._say(f"{version} is live")
        kept = {version, route.live} if keep_old else {version}
        for other in route.targets.keys() - kept:
            self._end(other)
        return versions

    def roll_back(self) -> ModelVersions:
        """Give all traffic to the version before the live one at once. Raises ConfigError where there is none."""
        known, route = registry.read(self._home).models.get(self._model, ModelVersions()), self._watch().route
        previous = known.previous
        if previous is None or previous == route.live or known.get(previous).state == "rolled-back":
            raise ConfigError("has no version before the live one to go back to", path="model", value=self._model,
                              fix="promote the export that should answer")  # fmt: skip
        target = route.targets.get(previous) or self._target_of(previous, known)
        bad, bad_folder = route.live, route.targets[route.live].folder
        if previous not in route.targets:
            try:
                self._start(previous, target)
            except BaseException:
                self._delete(target)
                raise
        self._put(route.beside(previous, target).promoted(previous))
        self._record(previous, target.folder, "live", f"rolled back from {bad}")
        versions = self._record(bad, bad_folder, "rolled-back", "by hand")
        self._say(f"{previous} is live")
        self._end(bad)
        return versions

    def shares(self) -> dict[str, float]:
        """The share of each version that runs."""
        route = self._watch().route
        return {version: route.weights.get(version, 0.0) for version in route.targets}

    def _target_of(self, version: str, known: ModelVersions) -> Target:
        folder = str((Path(self._home) / known.get(version).folder).resolve())
        if _whole(folder) != version:
            raise ExportError(f"is not version {version} any more", path=folder, fix="promote another export")
        return Target(front.app_of(self._model, version), folder)

    def _start(self, version: str, target: Target) -> None:
        self._say(f"starting {version} from {target.folder}")
        application = front.version_application(self._spec, self._model, target.folder)
        controller.deploy(target.app, application)
        controller.wait_until_running(target.app, self._spec)

    def _step(self, route: Route, version: str, policy: Policy) -> None:
        """Returns when the version has kept to the policy at this share. Raises PromotionError when it has not."""
        self._put(route)
        began, start = time.monotonic(), self._watch().tallies
        self._say(f"{version} has {route.weights[version]:.0%} of the traffic")
        is_told = False
        while True:
            seen = self._watch()
            if seen.route.weights != route.weights:
                raise PromotionError("the traffic was given back, for this process was not heard of in time")
            mine = seen.tallies.get(version, Tally()) - start.get(version, Tally())
            window = Window(time.monotonic() - began, mine, seen.tallies.get(route.live, Tally()))
            decision = policy.decide(window)
            if isinstance(decision, RollBack):
                raise PromotionError(decision.reason)
            if isinstance(decision, Hold):
                if decision.needs_requests and not is_told:
                    self._say(f"waiting for traffic: {mine.ended} of {policy.min_requests} answers")
                    is_told = True
                time.sleep(_POLL_S)
                continue
            self._say(f"passed: {mine.answered} answered, {mine.failed} failed in {window.elapsed_s:.0f} s")
            return

    def _go_back(self, route: Route, version: str, target: Target, reason: str) -> None:
        """The live version has everything, the candidate ends. What fails here is told, and tried by the next one."""
        self._say(f"rolling back {version}: {reason}")
        try:
            self._put(route)
            self._delete(target)
        except (RayError, RayServeException, RaySwiftError) as error:
            self._say(f"the endpoint could not be told: {error}; its board gives the traffic back within 30 s")
        self._record(version, target.folder, "rolled-back", reason)

    def _end(self, version: str) -> None:
        """A version that nobody is sent to any more ends, once its last answer has."""
        route = self._watch().route
        target = route.targets[version]
        self._put(route.without(version))
        self._delete(target)
        self._say(f"{version} has ended")

    def _put(self, route: Route) -> None:
        """Change the route. Returns when every front follows it; raises PromotionError when one cannot."""
        self._ask(self._board.put, self._model, route)
        deadline = time.monotonic() + _FOLLOW_TIMEOUT_S
        while not (seen := self._watch()).in_force:
            if seen.problem is not None:
                raise PromotionError(f"a front cannot open it: {seen.problem}")
            if time.monotonic() > deadline:
                raise PromotionError(f"the fronts did not follow within {_FOLLOW_TIMEOUT_S:g} s")
            time.sleep(_POLL_S)

    def _watch(self) -> Watched:
        seen: Watched = self._ask(self._board.watch, self._model, renew=True)
        return seen

    def _ask(self, method: Any, *arguments: Any, **named: Any) -> Any:
        try:
            return ray.get(method.remote(*arguments, **named), timeout=_CALL_TIMEOUT_S)
        except RayError as error:
            raise ServeError(f"the endpoint's board does not answer: {type(error).__name__}") from error

    def _delete(self, target: Target) -> None:
        if target.app in serve.status().applications:
            serve.delete(target.app)

    def _sweep(self, routes: dict[str, Route]) -> None:
        """End what a killed promotion has left: a candidate beside the live version, and applications of no route."""
        mine, known = routes[self._model], registry.read(self._home).models.get(self._model, ModelVersions())
        for version in known.versions:
            if version.state == "candidate":
                if version.id in mine.targets and version.id != mine.live:
                    self._end(version.id)
                self._record(version.id, str(Path(self._home) / version.folder), "rolled-back", "its promotion ended")
        routes = self._ask(self._board.routes)
        kept = {target.app for route in routes.values() for target in route.targets.values()} | {controller.APP_NAME}
        for name in serve.status().applications:
            if name.startswith(controller.APP_NAME) and name not in kept:
                self._say(f"ending {name}, which a promotion has left behind")
                serve.delete(name)

    def _record(self, version: str, folder: str, state: State, reason: str | None = None) -> ModelVersions:
        return registry.record(self._home, self._model, version, folder, state, reason)


def _chosen(model: str | None, known: list[str]) -> str:
    if model is None and len(known) == 1:
        return known[0]
    if model not in known:
        raise ConfigError("is not a model of this endpoint" if model else "has to be named: there are several",
                          path="--model", value=model, fix=f"use one of {', '.join(known)}")  # fmt: skip
    return model


def _whole(export: str) -> str:
    """The version of an export whose files are all as its manifest says. Raises ExportError for any other folder."""
    read_valid(export)
    return str(version_of(export))


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return str(error) if isinstance(error, RaySwiftError) else f"{type(error).__name__}: {error}"


def home_of(export: str) -> str:
    """The folder that an export lies in, where its registry is."""
    return os.path.dirname(os.path.abspath(export))


def running_shares(home: str) -> dict[str, dict[str, float]]:
    """The share of each version of each model as its endpoint routes now; empty where none runs."""
    record = registry.read_endpoint(home)
    if record is None:
        return {}
    with suppress(PlanError, ServeError, RayError), session(record.address, token=record.token):
        routes: dict[str, Route] = ray.get(front.board().routes.remote(), timeout=_CALL_TIMEOUT_S)
        return {name: {version: route.weights.get(version, 0.0) for version in route.targets}
                for name, route in routes.items()}  # fmt: skip
    return {}
