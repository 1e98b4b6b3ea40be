"""Who answers for each model of an endpoint with several versions: agreed by its fronts and whoever shifts traffic.

The board is the one place where it is written down; every front asks it twice a second, does what it says, and tells
how the versions are doing. Plain Python over plain values: knows no Ray, no engine, and not how a store keeps.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from pydantic import TypeAdapter, ValidationError

from rayswift.serving.spec import ServeSpec
from rayswift.serving.tallies import Tally

LEASE_S = 30.0
"""In which whoever shifts traffic has to ask again; then the live version has all of it back."""
FRONT_SILENT_S = 30.0
"""After which a front that is not heard from is not waited for; Serve looks after it at least as often."""
_log = logging.getLogger("rayswift.serving")


@dataclass(frozen=True)
class Target:
    """One version of a model where it runs."""

    app: str
    """The Ray Serve application."""
    folder: str
    """The export."""


@dataclass(frozen=True)
class Route:
    """The versions of one model that run, and the share of each. Invariant: the live one is among them."""

    live: str
    targets: Mapping[str, Target]
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        assert self.live in self.targets, "the live version runs"
        assert self.weights.keys() <= self.targets.keys(), "who answers runs"
        assert any(self.weights.values()), "somebody answers"

    @property
    def needed(self) -> frozenset[str]:
        """The versions without which nobody can route by this: those that are sent requests, and the live one."""
        return frozenset({self.live, *(version for version, share in self.weights.items() if share > 0)})

    def beside(self, version: str, target: Target) -> Route:
        """With another version that nobody is sent to yet."""
        return replace(self, targets={**self.targets, version: target})

    def alone(self) -> Route:
        """The live version without any other."""
        return replace(self.settled(), targets={self.live: self.targets[self.live]})

    def shared(self, version: str, share: float) -> Route:
        """The version has this share of the requests, the live one the rest."""
        return replace(self, weights={self.live: 1 - share, version: share})

    def settled(self) -> Route:
        """The live version has every request."""
        return replace(self, weights={self.live: 1.0})

    def promoted(self, version: str) -> Route:
        """The version is the live one and has every request; the one before still runs."""
        return replace(self, live=version).settled()

    def without(self, version: str) -> Route:
        """The version, which is not the live one, is sent nobody and may end."""
        targets = {name: target for name, target in self.targets.items() if name != version}
        return replace(self.settled(), targets=targets)

    def taken_back(self, later: Route) -> list[str]:
        """The versions whose traffic a later route gives to its live one, and not because they are replaced by it.

        The live version that a promotion replaces has lost its traffic by the last step, when it is still the live one.
        """
        return [
            version for version, share in self.weights.items()
            if share > 0 and not later.weights.get(version) and version != later.live
        ]  # fmt: skip


class WeightedPick:
    """Names in turn, each as often as its weight says: over any number of picks at most one too few or too many.

    Smooth weighted round robin, as in nginx. Weights are not negative and not all zero.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = {name: weight for name, weight in weights.items() if weight > 0}
        assert self._weights, "one version has to answer"
        self._total, self._credit = sum(self._weights.values()), dict.fromkeys(self._weights, 0.0)

    def __call__(self) -> str:
        for name, weight in self._weights.items():
            self._credit[name] += weight
        chosen = max(self._credit, key=self._credit.__getitem__)
        self._credit[chosen] -= self._total
        return chosen


@dataclass(frozen=True)
class Routing:
    """The route of one model. A higher revision is a later one."""

    revision: int
    route: Route


@dataclass(frozen=True)
class Followed:
    """How a front follows the routing of a model that it has been told."""

    routing: Routing
    problems: Mapping[str, str] = field(default_factory=dict)
    """By version: why it cannot be opened."""

    @property
    def is_in_force(self) -> bool:
        """Whether the front routes by it, be it without a version that nobody is sent to; else it goes on as before."""
        return not self.routing.route.needed & self.problems.keys()


@dataclass(frozen=True)
class Report:
    """What a front tells: how it follows each model's routing, and its counts since its start."""

    front: str
    followed: Mapping[str, Followed] = field(default_factory=dict)
    tallies: Mapping[str, Mapping[str, Tally]] = field(default_factory=dict)
    """By model and version."""


@dataclass(frozen=True)
class Watched:
    """A model as its fronts see it."""

    route: Route
    in_force: bool
    """Whether every front routes by it."""
    problems: Mapping[str, str]
    """By version: which front cannot open it, and why."""
    tallies: Mapping[str, Tally]
    """By version, of all fronts since their start, those that have ended included."""


class Store(Protocol):
    """Where a board keeps what one that is started anew has to know."""

    def read(self) -> bytes | None:
        """What was written last; None where nothing was."""

    def write(self, kept: bytes) -> None:
        """Returns once it is kept."""


@dataclass(frozen=True)
class _Kept:
    """The routings as they are stored. Another `format` is one of another release."""

    format: Literal[1]
    routings: dict[str, Routing]


_KEPT = TypeAdapter(_Kept)


class Board:
    """The routing of each model, who follows it, and the lease under which versions share traffic.

    A change is kept before anybody is told, so that one that is started anew goes on where the last one was, also when
    no front is left that knows. Of what it cannot read it learns from the fronts: theirs has the higher revision.
    """

    def __init__(
        self,
        routes: Mapping[str, Route],
        spec: ServeSpec | None = None,
        endpoint: str = "",
        now_s: Callable[[], float] = time.monotonic,
        store: Store | None = None,
    ) -> None:
        self._spec, self._endpoint, self._now_s, self._store = spec, endpoint, now_s, store
        self._routings = {model: Routing(1, route) for model, route in routes.items()} | self._kept()
        self._reports: dict[str, Report] = {}
        self._heard: dict[str, float] = {}
        self._leases: dict[str, float] = {}
        for model in self._routings:  # who shifts traffic may have ended too
            self._lease(model)

    def sync(self, report: Report) -> Mapping[str, Routing]:
        """Take a front's report; the routing of each model that it is to follow."""
        self._reports[report.front], self._heard[report.front] = report, self._now_s()
        for model, followed in report.followed.items():
            if followed.routing.revision > self._routings[model].revision:
                self._change(model, followed.routing)
        self._take_back()
        return self._routings

    def put(self, model: str, route: Route) -> None:
        """Change a model's route. Where versions share its traffic, `watch` has to be called every LEASE_S."""
        self._change(model, Routing(self._routings[model].revision + 1, route))

    def watch(self, model: str, *, renew: bool = False) -> Watched:
        """How a model is doing; `renew` says that whoever shifts its traffic is still there."""
        self._take_back()
        if renew and model in self._leases:
            self._lease(model)
        routing, now = self._routings[model], self._now_s()
        here = [report for front, report in self._reports.items() if now - self._heard[front] < FRONT_SILENT_S]
        # The whole of it: where nothing could be read, a revision that some front has seen may be given a second time.
        told = {report.front: report.followed[model] for report in here
                if model in report.followed and report.followed[model].routing == routing}  # fmt: skip
        in_force = bool(here) and len(told) == len(here) and all(one.is_in_force for one in told.values())
        problems = {version: f"front {front} cannot open version {version}: {text}"
                    for front, one in told.items() for version, text in one.problems.items()}  # fmt: skip
        return Watched(routing.route, in_force, problems, self._tallies(model))

    def routes(self) -> Mapping[str, Route]:
        """The route of each model."""
        return {model: routing.route for model, routing in self._routings.items()}

    def spec(self) -> ServeSpec | None:
        """What versions are started by: the endpoint's own spec, without its keys."""
        return self._spec

    def endpoint(self) -> str:
        """The id of the endpoint, as in its `registry.EndpointRecord`."""
        return self._endpoint

    def _tallies(self, model: str) -> dict[str, Tally]:
        found: dict[str, Tally] = {}
        for report in self._reports.values():
            for version, tally in report.tallies.get(model, {}).items():
                found[version] = found.get(version, Tally()) + tally
        return found

    def _take_back(self) -> None:
        """Give the live version everything where nobody has watched over a shared model for too long."""
        for model, until in list(self._leases.items()):
            if self._now_s() > until:
                self.put(model, self._routings[model].route.settled())

    def _change(self, model: str, routing: Routing) -> None:
        routings = {**self._routings, model: routing}
        if self._store is not None:
            self._store.write(_KEPT.dump_json(_Kept(1, routings)))
        self._routings = routings
        self._lease(model)

    def _lease(self, model: str) -> None:
        self._leases.pop(model, None)
        if len(self._routings[model].route.weights) > 1:
            self._leases[model] = self._now_s() + LEASE_S

    def _kept(self) -> dict[str, Routing]:
        """The routings that a board of this endpoint has kept; none where it is the first."""
        kept = None if self._store is None else self._store.read()
        try:
            return {} if kept is None else _KEPT.validate_json(kept).routings
        except ValidationError as error:
            _log.error("what was kept of the endpoint's routes is of another release: until a front tells, they are "
                       "those of its start; promote again what should answer (%s)", error)  # fmt: skip
            return {}
