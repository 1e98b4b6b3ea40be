"""The board of the cluster's endpoint as an actor: started, found, asked and ended, and where it keeps its routings.

Knows Ray's actors and its key-value store. What a board decides is known by `serving/routing.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.experimental import internal_kv

from rayswift.cluster.session import session
from rayswift.errors import PlanError, ServeError
from rayswift.serving.registry import EndpointRecord, read_endpoint
from rayswift.serving.routing import Board, Route
from rayswift.serving.spec import ServeSpec

BOARD, NAMESPACE = "rayswift-board", "rayswift"
_CALL_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class ClusterStore:
    """A `routing.Store` that lives as long as the cluster's own state does: there Serve's controller keeps its, too.

    Ray has no documented place of that kind for anybody else (ray 2.60): this one it calls internal.
    """

    endpoint: str

    @property
    def _key(self) -> str:
        return f"{BOARD}/{self.endpoint}"

    def read(self) -> bytes | None:
        found: bytes | None = internal_kv._internal_kv_get(self._key, namespace=NAMESPACE)
        return found

    def write(self, kept: bytes) -> None:
        internal_kv._internal_kv_put(self._key, kept, overwrite=True, namespace=NAMESPACE)


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


def running_shares(home: str) -> dict[str, dict[str, float]]:
    """The share of each version of each model as its endpoint routes now; empty where none runs."""
    record = read_endpoint(home)
    if record is None:
        return {}
    with suppress(PlanError, ServeError), session(record.address, token=record.token):
        routes: dict[str, Route] = asked(board_of(record).routes)
        return {name: {version: route.weights.get(version, 0.0) for version in route.targets}
                for name, route in routes.items()}  # fmt: skip
    return {}


def start_board(routes: Mapping[str, Route], spec: ServeSpec, endpoint: str) -> None:
    """Start the board of an endpoint, in the place of one that a killed endpoint may have left."""
    stop_board()
    actor: Any = ray.remote(Board)
    actor.options(
        name=BOARD, namespace=NAMESPACE, lifetime="detached", num_cpus=0, max_restarts=-1, max_task_retries=3
    ).remote(routes, spec, endpoint, store=ClusterStore(endpoint))


def stop_board() -> None:
    """End the board, if there is one, and forget what it or one before it has kept."""
    with suppress(ServeError):
        ray.kill(board())
    internal_kv._internal_kv_del(f"{BOARD}/", del_by_prefix=True, namespace=NAMESPACE)
