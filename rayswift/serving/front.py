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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError

from rayswift.cluster.session import is_token_asked
from rayswift.errors import ServeError
from rayswift.serving import controller, registry
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
from rayswift.serving.routing import Board, Problem, Report, Route, Routing, Target
from rayswift.serving.served import ServedModel, started
from rayswift.serving.spec import ServeSpec
from rayswift.serving.traffic import CountedEngine, Versions
from rayswift.serving.versions import version_of

BOARD, NAMESPACE = "rayswift-board", "rayswift"
_SYNC_S, _PING_EVERY_S, _BOARD_TIMEOUT_S, _OPEN_TIMEOUT_S = 0.5, 5.0, 10.0, 60.0
_CALL_TIMEOUT_S, _PATIENCE_S = 60.0, 10.0
_log = logging.getLogger("rayswift.serving")


class FrontReplica:
    """One front: the ASGI app over the versions that the board names."""

    async def __init__(self, spec: ServeSpec) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        self._spec, self._name = spec, uuid.uuid4().hex
        self._tasks: list[asyncio.Task[None]] = []
        self._models: dict[str, Versions] = {}
        self._opened: dict[tuple[str, str], ServedModel] = {}
        self._routing: Routing | None = None
        self._problem: Problem | None = None
        self._board = board()
        routing = await self._board.sync.remote(Report(self._name))
        problem = await self._follow(routing)
        if problem is not None and routing != routing.alone():
            problem = await self._follow(routing.alone())  # what a promotion may have left keeps none from starting
        if problem is not None:
            raise ServeError(problem.text)
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

    async def _keep_following(self) -> None:
        """Ask the board for ever, also while a version is being opened: who is silent is not waited for.

        While the board does not answer, the routing stays as it is.
        """
        following: asyncio.Task[Any] = asyncio.create_task(asyncio.sleep(0))
        try:
            while True:
                await asyncio.sleep(_SYNC_S)
                report = Report(self._name, self._routing, self._problem, self._tallies())
                with suppress(RayError, TimeoutError):
                    routing = await asyncio.wait_for(self._board.sync.remote(report), _BOARD_TIMEOUT_S)
                    if following.done():
                        following = asyncio.create_task(self._follow(routing))
        finally:
            following.cancel()

    async def _follow(self, routing: Routing) -> Problem | None:
        """Route by this from now on; where a version cannot be opened, go on as before and say why."""
        if routing == self._routing:
            return None
        models = {}
        for model, route in routing.routes.items():
            try:
                models[model] = await self._versions(model, route)
            except Exception as error:  # whatever an export makes a tokenizer raise, clients are answered as before
                problem = Problem(routing.revision, model, f"{type(error).__name__}: {error}")
                if problem != self._problem:
                    _log.warning("revision %d cannot be followed: %s", routing.revision, problem.text)
                self._problem = problem
                return problem
        self._models.update(models)
        if self._routing is not None:
            self._give_up(self._routing, routing)
        self._routing, self._problem = routing, None
        wanted = {(model, version) for model, route in routing.routes.items() for version in route.targets}
        self._opened = {key: model for key, model in self._opened.items() if key in wanted}
        return None

    def _give_up(self, before: Routing, now: Routing) -> None:
        """What a version that was taken back has not begun to answer, the live one answers where that one hangs."""
        for model, route in before.routes.items():
            for version in route.taken_back(now.routes[model]):
                engine = self._opened[model, version].engine
                assert isinstance(engine, CountedEngine)
                engine.give_up(_PATIENCE_S)

    async def _versions(self, model: str, route: Route) -> Versions:
        for version, target in route.targets.items():
            if (model, version) not in self._opened:
                self._opened[model, version] = await self._open(target)
        return Versions({one: self._opened[model, one] for one in route.targets}, route.weights, route.live)

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
        found: dict[str, dict[str, Any]] = {}
        for (model, version), served in self._opened.items():
            assert isinstance(served.engine, CountedEngine)
            found.setdefault(model, {})[version] = served.engine.tally
        return found

    async def _keep_pinging(self) -> None:
        while True:
            await asyncio.sleep(_PING_EVERY_S)
            engines = [served.engine for served in self._opened.values()]
            inner = [engine.inner for engine in engines if isinstance(engine, CountedEngine)]
            await asyncio.gather(*(engine.ping() for engine in inner if isinstance(engine, RemoteEngine)))


def board() -> Any:
    """The handle of the cluster's board. Raises ServeError where there is none."""
    try:
        return ray.get_actor(BOARD, namespace=NAMESPACE)
    except ValueError:
        raise ServeError(
            "no endpoint whose versions can be promoted runs on this Ray cluster",
            fix="start one with `rayswift serve --promotable EXPORT`",
        ) from None


def board_of(record: EndpointRecord) -> Any:
    """The board of the endpoint that wrote this, on the connected cluster. Raises ServeError where it has ended."""
    found = board()
    if asked(found.endpoint) != record.id:
        raise ended(record)
    return found


def ended(record: EndpointRecord) -> ServeError:
    """What is told of an endpoint that its record outlived."""
    return ServeError(f"the endpoint at {record.url} (process {record.pid}) does not run any more",
                      fix="start it again with `rayswift serve --promotable`")  # fmt: skip


def asked(method: Any, *arguments: Any, **named: Any) -> Any:
    """What the board says. Raises ServeError where it does not answer."""
    try:
        return ray.get(method.remote(*arguments, **named), timeout=_CALL_TIMEOUT_S)
    except RayError as error:
        raise ServeError(f"the endpoint's board does not answer: {type(error).__name__}") from error


def start_board(spec: ServeSpec, endpoint: str) -> None:
    """Start the board of an endpoint, in the place of one that a killed endpoint may have left."""
    stop_board()
    routes = {model: _first_route(model, folder) for model, folder in spec.models.items()}
    actor: Any = ray.remote(Board)
    actor.options(
        name=BOARD, namespace=NAMESPACE, lifetime="detached", num_cpus=0, max_restarts=-1, max_task_retries=3
    ).remote(routes, _without_keys(spec), endpoint)


def _without_keys(spec: ServeSpec) -> ServeSpec:
    """Only fronts are asked by clients."""
    return spec.model_copy(update={"api_key_sha256": (), "api_keys": ()})


def stop_board() -> None:
    """End the board, if there is one."""
    with suppress(ServeError):
        ray.kill(board())


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
    start_board(spec, endpoint.id)
    try:
        routes = {model: _first_route(model, folder) for model, folder in spec.models.items()}
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
