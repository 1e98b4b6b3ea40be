"""The applications of an endpoint whose versions can be promoted: fronts that answer HTTP, a board, and each version.

A front has keys, prompts and streams; the engines run in applications of their own, one per version, so that a new one
can start beside the old and traffic can be shifted between them without a request being dropped. It costs each token
one more step between processes, which is why an endpoint is only built this way when it is asked for.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import re
import sys
import uuid
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError

from rayswift.cluster.session import is_token_asked
from rayswift.errors import ServeError
from rayswift.serving import controller, registry
from rayswift.serving.boards import board, start_board, stop_board
from rayswift.serving.controller import APP_NAME
from rayswift.serving.http import build_asgi
from rayswift.serving.owners import this_process
from rayswift.serving.placement import (
    actor_options,
    front_options,
    replica_options,
    routing_options,
    serve_options,
)
from rayswift.serving.registry import EndpointRecord
from rayswift.serving.remote import RemoteEngine, VersionReplica
from rayswift.serving.routing import Followed, Report, Route, Routing, Target
from rayswift.serving.served import ServedModel, started
from rayswift.serving.spec import ServeSpec
from rayswift.serving.traffic import CountedEngine, Versions
from rayswift.serving.versions import version_of

_SYNC_S, _PING_EVERY_S, _BOARD_TIMEOUT_S, _OPEN_TIMEOUT_S, _PATIENCE_S = 0.5, 5.0, 10.0, 60.0, 10.0
_log = logging.getLogger("rayswift.serving")


class FrontReplica:
    """One front: the ASGI app over the versions that the board names."""

    async def __init__(self, spec: ServeSpec) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        mine = this_process()
        self._spec, self._name = spec, f"{mine.pid}@{mine.host}/{uuid.uuid4().hex[:8]}"
        self._tasks: list[asyncio.Task[None]] = []
        self._models: dict[str, Versions] = {}
        self._opened: dict[str, dict[str, ServedModel]] = {model: {} for model in spec.models}
        self._routed: dict[str, tuple[Route, frozenset[str]]] = {}
        self._followed: dict[str, Followed] = {}
        self._board = board()
        for model, routing in (await self._board.sync.remote(Report(self._name))).items():
            await self._begin(model, routing)
        self._tasks = [asyncio.create_task(self._keep_following()), asyncio.create_task(self._keep_pinging())]
        gc.freeze()

    def __serve_build_asgi_app__(self) -> Any:
        return build_asgi(self._spec, self._models)

    async def check_health(self) -> None:
        """Raises when it follows the board no more; Serve then replaces it."""
        for task in self._tasks:
            if task.done():
                raise ServeError("a front has stopped following the board")

    async def __del__(self) -> None:  # Ray Serve awaits it before it ends the replica
        for task in self._tasks:
            task.cancel()

    async def _begin(self, model: str, routing: Routing) -> None:
        """Route a model for the first time. What a promotion may have left keeps no front from starting.

        Raises ServeError where the live version cannot be opened.
        """
        await self._follow(model, routing)
        if model not in self._models and routing.route != (alone := routing.route.alone()):
            await self._follow(model, replace(routing, route=alone))
        if model not in self._models:
            live = routing.route.live
            raise ServeError(f"version {live} of {model} cannot be opened: {self._followed[model].problems[live]}")

    async def _keep_following(self) -> None:
        """Ask the board for ever, also while versions are being opened: who is silent is not waited for.

        While the board does not answer, the routings stay as they are. No model waits for another one's versions, nor
        for those of a routing that is not its last.
        """
        following: dict[str, tuple[Routing, asyncio.Task[None]]] = {}
        try:
            while True:
                await asyncio.sleep(_SYNC_S)
                report = Report(self._name, dict(self._followed), self._tallies())
                with suppress(RayError, TimeoutError):
                    told = await asyncio.wait_for(self._board.sync.remote(report), _BOARD_TIMEOUT_S)
                    for model, routing in told.items():
                        if model in following and not following[model][1].done():
                            if following[model][0] == routing:
                                continue
                            following[model][1].cancel()
                        following[model] = routing, asyncio.create_task(self._follow(model, routing))
        finally:
            for _, task in following.values():
                task.cancel()

    async def _follow(self, model: str, routing: Routing) -> None:
        """Route a model by this from now on; where a version that it needs cannot be opened, go on as before.

        A version that nobody is sent to is left out until it can be opened. What cannot be is told to the board.
        """
        before, route = self._followed.get(model), routing.route
        if before == Followed(routing):
            return
        problems = await self._open_missing(model, route, route.needed)
        if not problems:
            self._route(model, route)
            problems = await self._open_missing(model, route, route.targets.keys() - route.needed)
            self._route(model, route)
        followed = self._followed[model] = Followed(routing, problems)
        if problems and followed != before:
            _log.warning("revision %d of %s cannot be followed in whole: %s", routing.revision, model, problems)

    async def _open_missing(self, model: str, route: Route, versions: Set[str]) -> dict[str, str]:
        """Open what is not open yet; why it cannot be, by version."""
        opened, problems = self._opened[model], {}
        for version in versions - opened.keys():
            try:
                opened[version] = await self._open(route.targets[version])
            except Exception as error:  # whatever an export makes a tokenizer raise, clients are answered as before
                problems[version] = f"{type(error).__name__}: {error}"
        return problems

    def _route(self, model: str, route: Route) -> None:
        """Send requests by this to what is open of it. What a version that was taken back has not begun to answer, the
        live one answers where that one hangs."""
        opened, (before, known) = self._opened[model], self._routed.get(model, (route, frozenset[str]()))
        for version in before.taken_back(route):
            engine = opened[version].engine
            assert isinstance(engine, CountedEngine)
            engine.give_up(_PATIENCE_S)
        for version in opened.keys() - route.targets.keys():
            del opened[version]
        if (before, known) != (route, frozenset(opened)):  # else whose turn it is would be forgotten
            self._models[model] = Versions(opened, route.weights, route.live)
            self._routed[model] = route, frozenset(opened)

    async def _open(self, target: Target) -> ServedModel:
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT_S):  # of an application without a replica nothing is ever heard
                # Serve's controller is asked, and may be away: in a thread, so that others are answered meanwhile
                handle = await asyncio.to_thread(serve.get_app_handle, target.app)
                engine = CountedEngine(RemoteEngine(handle, self._spec, target.folder))
                return await started(self._spec, target.folder, engine)
        except TimeoutError:
            raise ServeError(f"{target.folder} could not be opened within {_OPEN_TIMEOUT_S:g} s") from None

    def _tallies(self) -> dict[str, dict[str, Any]]:
        return {model: {version: served.engine.tally for version, served in opened.items()
                        if isinstance(served.engine, CountedEngine)}
                for model, opened in self._opened.items()}  # fmt: skip

    async def _keep_pinging(self) -> None:
        while True:
            await asyncio.sleep(_PING_EVERY_S)
            engines = [served.engine for opened in self._opened.values() for served in opened.values()]
            inner = [engine.inner for engine in engines if isinstance(engine, CountedEngine)]
            await asyncio.gather(*(engine.ping() for engine in inner if isinstance(engine, RemoteEngine)))


def _without_keys(spec: ServeSpec) -> ServeSpec:
    """Only fronts are asked by clients."""
    return spec.model_copy(update={"api_key_sha256": (), "api_keys": ()})


def _first_route(model: str, folder: str) -> Route:
    version = version_of(folder)
    assert version is not None, "a promotable spec has exports only"
    return Route(version, {version: Target(app_of(model, version), folder)}, {version: 1.0})


def app_of(model: str, version: str) -> str:
    """The application that runs a version of a model."""
    plain, told_apart = re.sub(r"[^A-Za-z0-9]+", "-", model), hashlib.sha256(model.encode()).hexdigest()[:6]
    return f"{APP_NAME}-{plain}-{told_apart}-{version}"


def version_application(spec: ServeSpec, model: str, folder: str) -> serve.Application:
    """The application of one version: as many replicas of its engine as the spec says."""
    alone = _without_keys(spec).model_copy(update={"models": {model: folder}})
    deployment: Any = serve.deployment(
        name="version",
        **replica_options(alone),
        **serve_options(alone),
        **routing_options(alone),
        ray_actor_options=actor_options(alone),
    )(VersionReplica)
    application: serve.Application = deployment.bind(alone, folder)
    return application


def front_application(spec: ServeSpec) -> serve.Application:
    """The application that answers HTTP; the versions it begins with have to run."""
    deployment: Any = serve.deployment(
        name="endpoint", **replica_options(spec), **serve_options(spec), ray_actor_options=front_options(spec)
    )(serve.ingress()(FrontReplica))
    application: serve.Application = deployment.bind(spec)
    return application


def _check_homes(exports: Mapping[str, str], endpoint: EndpointRecord) -> None:
    """Raises ConfigError where versions cannot be written down, before one is loaded for nothing; model -> export.

    Who starts another version than the one that was live is told, and whose place is taken.
    """
    homes = {model: Path(export).resolve().parent for model, export in exports.items()}
    for home in dict.fromkeys(homes.values()):
        with registry.locked(home):
            known, stale = registry.read(home).models, registry.stale_owner(home, endpoint)
        if stale is not None:
            print(f"note: {home} was served at {stale.url}, which does not run any more (process {stale.pid})",
                  file=sys.stderr)  # fmt: skip
        for model in (one for one in exports if homes[one] == home and one in known):
            live, version = known[model].live, version_of(exports[model])
            if live not in (None, version):
                print(f"note: {model} is served as version {version}; {live} was live in {home}", file=sys.stderr)


@contextmanager
def serving_versions(spec: ServeSpec) -> Iterator[None]:
    """Boards, versions and fronts of a spec run for the duration, and their registry knows where. Raises ServeError."""
    endpoint = _record(spec)
    _check_homes(spec.models, endpoint)
    routes = {model: _first_route(model, folder) for model, folder in spec.models.items()}
    start_board(routes, _without_keys(spec), endpoint.id)
    try:
        for model, route in routes.items():
            target = route.targets[route.live]
            controller.deploy(target.app, version_application(spec, model, target.folder))
        for route in routes.values():
            controller.wait_until_running(route.targets[route.live].app, spec)
        controller.deploy(APP_NAME, front_application(spec), route_prefix="/")
        controller.wait_until_answering(spec)
        served = {model: (route.live, spec.models[model]) for model, route in routes.items()}
        with registry.announced(served, endpoint):
            yield
    finally:
        stop_board()


def _record(spec: ServeSpec) -> EndpointRecord:
    address, mine = ray.get_runtime_context().gcs_address, this_process()
    return EndpointRecord(id=uuid.uuid4().hex, address=address, token=is_token_asked(), url=spec.url, pid=mine.pid,
                          host=mine.host, started=mine.started)  # fmt: skip
