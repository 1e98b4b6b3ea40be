"""Where a board keeps its routings in Ray: by endpoint, and not longer than the endpoint runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rayswift.errors import ServeError
from rayswift.serving import boards
from rayswift.serving.boards import ClusterStore
from rayswift.serving.routing import Board, Report, Route, Target
from rayswift.serving.spec import ServeSpec

_OLD, _NEW = "0" * 12, "1" * 12
_ROUTE = Route(_OLD, {_OLD: Target("a", "exports/a")}, {_OLD: 1.0})
_PROMOTED = _ROUTE.beside(_NEW, Target("b", "exports/b")).promoted(_NEW).without(_OLD)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], bytes]:
    """What the cluster keeps, by namespace and key; no board runs on it."""
    values: dict[tuple[str, str], bytes] = {}

    def put(key: str, value: bytes, overwrite: bool, namespace: str) -> None:
        assert overwrite
        values[namespace, key] = value

    def delete(key: str, del_by_prefix: bool, namespace: str) -> None:
        assert del_by_prefix
        for place in [one for one in values if one[0] == namespace and one[1].startswith(key)]:
            del values[place]

    def none() -> Any:
        raise ServeError("no endpoint runs here")

    monkeypatch.setattr(boards.internal_kv, "_internal_kv_get", lambda key, namespace: values.get((namespace, key)))
    monkeypatch.setattr(boards.internal_kv, "_internal_kv_put", put)
    monkeypatch.setattr(boards.internal_kv, "_internal_kv_del", delete)
    monkeypatch.setattr(boards, "board", none)
    return values


def test_what_an_endpoint_has_kept_is_its_own_and_ends_with_it(kept: dict[tuple[str, str], bytes]) -> None:
    kept["rayswift", "another"] = b"of somebody else"
    store = ClusterStore("e")
    Board({"m": _ROUTE}, store=store).put("m", _PROMOTED)
    assert Board({"m": _ROUTE}, store=store).sync(Report("one"))["m"].route == _PROMOTED
    assert Board({"m": _ROUTE}, store=ClusterStore("another endpoint")).routes() == {"m": _ROUTE}
    boards.stop_board()
    assert store.read() is None
    assert list(kept) == [("rayswift", "another")]


def test_a_board_that_starts_forgets_what_a_killed_endpoint_has_left(
    kept: dict[tuple[str, str], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Board] = []

    def remote(routes: Any, spec: Any, endpoint: str, *, store: Any) -> None:
        started.append(Board(routes, spec, endpoint, store=store))

    actor = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=remote))
    monkeypatch.setattr(boards.ray, "remote", lambda kind: actor)
    Board({"m": _ROUTE}, store=ClusterStore("killed")).put("m", _PROMOTED)
    boards.start_board({"m": _ROUTE}, ServeSpec(models={"m": "exports/a"}), "e")
    assert not kept
    assert (started[0].endpoint(), started[0].routes()) == ("e", {"m": _ROUTE})
    started[0].put("m", _PROMOTED)
    assert Board({"m": _ROUTE}, store=ClusterStore("e")).routes() == {"m": _PROMOTED}
