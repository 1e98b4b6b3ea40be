"""Who answers for each model of an endpoint with several versions: agreed by its fronts and whoever shifts traffic.

The board is the one place where it is written down; every front asks it twice a second, does what it says, and tells
how the versions are doing. Plain Python over plain values: knows no Ray and no engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from rayswift.serving.spec import ServeSpec
from rayswift.serving.tallies import Tally

LEASE_S = 30.0
"""In which whoever shifts traffic has to ask again; then the live version has all of it back."""
FRONT_SILENT_S = 30.0
"""After which a front that is not heard from is not waited for; Serve looks after it at least as often."""


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


@dataclass(frozen=True)
class Routing:
    """The routes of all models. A higher revision is a later one."""

    revision: int
    routes: Mapping[str, Route]

    def alone(self) -> Routing:
        """The live version of each model without any other."""
        return replace(self, routes={model: route.alone() for model, route in self.routes.items()})


@dataclass(frozen=True)
class Problem:
    """Why a front cannot follow a routing."""

    revision: int
    model: str
    """The one whose version it cannot open."""
    text: str


@dataclass(frozen=True)
class Report:
    """What a front tells: by what it routes, what it cannot follow, and its counts since its start."""

    front: str
    routing: Routing | None = None
    problem: Problem | None = None
    tallies: Mapping[str, Mapping[str, Tally]] = field(default_factory=dict)
    """By model and version."""


@dataclass(frozen=True)
class Watched:
    """A model as its fronts see it."""

    route: Route
    in_force: bool
    """Whether every front routes by it."""
    problem: str | None
    """Why one cannot."""
    tallies: Mapping[str, Tally]
    """By version, of all fronts since their start, those that have ended included."""


class Board:
    """The routing, who follows it, and the lease under which versions share traffic.

    One that is started anew learns the latest routing from the fronts: theirs has the higher revision.
    """

    def __init__(
        self,
        routes: Mapping[str, Route],
        spec: ServeSpec | None = None,
        endpoint: str = "",
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._routing, self._spec, self._endpoint, self._now_s = Routing(1, dict(routes)), spec, endpoint, now_s
        self._reports: dict[str, Report] = {}
        self._heard: dict[str, float] = {}
        self._leases: dict[str, float] = {}

    def sync(self, report: Report) -> Routing:
        """Take a front's report; the routing it is to follow."""
        self._reports[report.front], self._heard[report.front] = report, self._now_s()
        if report.routing is not None and report.routing.revision > self._routing.revision:
            self._routing = report.routing
            self._leases = {model: self._now_s() + LEASE_S for model, route in report.routing.routes.items()
                            if len(route.weights) > 1}  # fmt: skip
        self._take_back()
        return self._routing

    def put(self, model: str, route: Route) -> None:
        """Change a model's route. Where versions share its traffic, `watch` has to be called every LEASE_S."""
        routes = {**self._routing.routes, model: route}
        self._routing = Routing(self._routing.revision + 1, routes)
        self._leases.pop(model, None)
        if len(route.weights) > 1:
            self._leases[model] = self._now_s() + LEASE_S

    def watch(self, model: str, *, renew: bool = False) -> Watched:
        """How a model is doing; `renew` says that whoever shifts its traffic is still there."""
        self._take_back()
        if renew and model in self._leases:
            self._leases[model] = self._now_s() + LEASE_S
        here = [self._reports[front] for front, at in self._heard.items() if self._now_s() - at < FRONT_SILENT_S]
        # The whole of it: a board that was started anew may give a revision that some front has seen a second time.
        in_force = bool(here) and all(report.routing == self._routing for report in here)
        problems = [report.problem for report in here if report.problem is not None]
        mine = [one.text for one in problems if (one.revision, one.model) == (self._routing.revision, model)]
        return Watched(self._routing.routes[model], in_force, mine[0] if mine else None, self._tallies(model))

    def routes(self) -> Mapping[str, Route]:
        """The route of each model."""
        return self._routing.routes

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
                self.put(model, self._routing.routes[model].settled())
