"""How many cores replicas get, and what is told of a cluster that others reach."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rayswift.errors import ServeError
from rayswift.serving import app, controller, process
from rayswift.serving.placement import actor_options, with_cores
from rayswift.serving.spec import ServeSpec


def spec(**more: Any) -> ServeSpec:
    return ServeSpec.model_validate({"models": {"m": "unused"}, "engine": "local", **more})


@pytest.mark.parametrize(
    ("more", "share"),
    [
        ({}, 15),
        ({"num_replicas": 3}, 5),
        ({"num_replicas": 2, "max_replicas": 4}, 3),
        ({"num_replicas": 40}, 1),
        ({"cpus_per_replica": 0.5}, 0.5),
        ({"cpus_per_replica": 0}, 0),
        ({"gpus_per_replica": 1}, 1),
        ({"promotable": True}, 1),
    ],
)
def test_replicas_share_the_cores_of_a_cluster_of_their_own(more: dict[str, Any], share: float) -> None:
    options = actor_options(with_cores(spec(**more), 16))
    assert options["num_cpus"] == share
    assert options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == str(max(1, int(share)))


def test_a_replica_has_one_core_where_others_compute_too() -> None:
    assert actor_options(spec())["num_cpus"] == 1


@pytest.mark.parametrize(
    ("host", "is_own", "mode", "is_told"),
    [
        ("0.0.0.0", False, "", True),
        ("0.0.0.0", False, "token", False),
        ("0.0.0.0", False, "Token", False),
        ("0.0.0.0", True, "", False),
        ("127.0.0.1", False, "disabled", True),
        ("127.0.0.1", True, "", False),
    ],
)
def test_a_cluster_that_asks_nobody_is_told_whatever_the_address(
    host: str, is_own: bool, mode: str, is_told: bool,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    @contextmanager
    def session(address: str | None) -> Iterator[bool]:
        yield is_own

    def no_further(_: ServeSpec) -> Any:
        raise ServeError("far enough")

    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setattr(app, "checked", lambda spec: spec)
    monkeypatch.setattr(app, "session", session)
    monkeypatch.setattr(app.ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(process, "check_port", lambda *_: None)
    monkeypatch.setattr(controller, "serving", no_further)
    with pytest.raises(ServeError, match="far enough"):
        app.serve_in_background(spec(host=host))
    assert ("asks for no token" in capsys.readouterr().err) == is_told
