"""How many cores replicas get, and what is told of a cluster that others reach."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rayswift.errors import ConfigError, ServeError
from rayswift.serving import app, controller, process
from rayswift.serving.engine import EngineOptions
from rayswift.serving.engines import local
from rayswift.serving.placement import actor_options, engine_options, surge_percent, with_cores, with_gpus
from rayswift.serving.spec import ServeSpec

_NO_ROOM = (
    "an update ends a replica before it starts the next, and nobody answers until that one is there: 1 x 1 of 1 GPUs "
    "leave no room for both; for a cluster that grows give the deployment endpoint max_surge_percent: 25 in Serve's "
    "config"
)


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
    ("more", "num_gpus", "gpus"),
    [
        ({}, 0, 0),
        ({}, 8, 1),
        ({"device": "cpu"}, 8, 0),
        ({"device": "npu"}, 8, 0),
        ({"device": "cuda"}, 1, 1),
        ({"gpus_per_replica": 0}, 8, 0),
        ({"gpus_per_replica": 0.5}, 0, 0.5),
        ({"tensor_parallel": 4}, 8, 4),
        ({"models": {"a": "x", "b": "y"}}, 8, 2),
        ({"models": {"a": "x", "b": "y"}}, 1, 1),  # which they share
        ({"models": {"a": "x", "b": "y"}, "num_replicas": 2}, 3, 1),
        ({"models": {"a": "x", "b": "y"}, "num_replicas": 2}, 4, 2),
        ({"models": {"a": "x", "b": "y"}, "tensor_parallel": 2}, 8, 4),
        ({"models": {"a": "x", "b": "y"}, "promotable": True}, 8, 1),
        ({"models": {"a": "x", "b": "y"}, "promotable": True}, 2, 1),
        ({"models": {"a": "x", "b": "y"}, "promotable": True}, 1, 0.5),  # each version is a replica of its own
        ({"models": {"a": "x", "b": "y", "c": "z"}, "promotable": True}, 1, 0.3333),
        ({"models": {"a": "x", "b": "y", "c": "z"}, "promotable": True}, 2, 0.5),
        ({"promotable": True, "num_replicas": 2}, 1, 1),
        ({"models": {"a": "x", "b": "y"}, "promotable": True, "num_replicas": 2}, 1, 0.5),
    ],
)
def test_a_replica_reserves_gpus_where_the_cluster_has_them(more: dict[str, Any], num_gpus: int, gpus: float) -> None:
    found, told = with_gpus(spec(**more), num_gpus)
    assert found.gpus_per_replica == gpus
    assert (told is not None) == (gpus > 0 and "gpus_per_replica" not in more)
    assert told is None or told.startswith(f"gpus_per_replica={gpus}, of {num_gpus} GPUs of the cluster")
    variables = actor_options(found)["runtime_env"]["env_vars"]
    assert actor_options(found)["num_gpus"] == gpus
    assert variables.get("CUDA_VISIBLE_DEVICES") == (None if gpus else "")  # Ray names those that it has reserved


@pytest.mark.parametrize(("num_gpus", "more", "told"), [
    (0, {}, "note: gpus_per_replica=0, as this machine has none; name it for the GPUs of a cluster"),
    (0, {"gpus_per_replica": 2}, ""),
    (4, {}, "note: gpus_per_replica=1, of 4 GPUs of the cluster"),
    (1, {}, f"note: gpus_per_replica=1, of 1 GPUs of the cluster\nnote: {_NO_ROOM}"),
    (1, {"gpus_per_replica": 1}, f"note: {_NO_ROOM}"),
])  # fmt: skip
def test_the_choice_of_gpus_is_told_by_ray_serves_own_commands_too(
    num_gpus: int, more: dict[str, Any], told: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(app, "checked", lambda spec: spec)
    monkeypatch.setattr(app.ray, "is_initialized", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    made = app.build_app(spec(**more))
    assert capsys.readouterr().err.strip() == told
    assert made._bound_deployment.ray_actor_options["num_gpus"] == more.get("gpus_per_replica", min(1, num_gpus))
    assert made._bound_deployment._deployment_config.max_surge_percent == (0 if _NO_ROOM in told else 25)


def test_a_lack_of_gpus_is_told() -> None:
    with pytest.raises(ConfigError, match=r"device=cuda needs a GPU, and Ray's cluster has none"):
        with_gpus(spec(device="cuda"), 0)
    for num_gpus, is_tight in ((1, True), (2, False)):
        _, told = with_gpus(spec(promotable=True), num_gpus)
        assert ("a version to promote needs as many free: 0.5 leaves room for it" in str(told)) == is_tight
    two = spec(models={"a": "x", "b": "y"}, promotable=True)
    assert "as many free: 0.3333 leaves room" in str(with_gpus(two, 1)[1])
    pair = spec(promotable=True, num_replicas=2)  # so has the version that comes
    assert "as many free: 0.5 leaves room" in str(with_gpus(pair, 3)[1])
    assert "as many free" not in str(with_gpus(pair, 4)[1])
    assert str(with_gpus(spec(promotable=True, tensor_parallel=2), 2)[1]).endswith("needs as many free")


@pytest.mark.parametrize(("more", "needed"), [
    ({"tensor_parallel": 2}, 2), ({"tensor_parallel": 2, "promotable": True}, 2),
    ({"tensor_parallel": 2, "models": {"a": "x", "b": "y"}}, 4),
])  # fmt: skip
def test_a_replica_that_cannot_be_placed_is_refused_at_once(more: dict[str, Any], needed: int) -> None:
    with pytest.raises(
        ConfigError, match=f"tensor_parallel=2 needs {needed} GPUs .* has 1; .*gpus_per_replica: {needed}"
    ):
        with_gpus(spec(**more), 1)
    assert with_gpus(spec(**more, gpus_per_replica=needed), 1)[1] is None, "nodes that are still to come"


@pytest.mark.parametrize(
    ("more", "num_gpus", "taken"),
    [({"num_replicas": 2}, 1, "2 replicas take 2"), ({"max_replicas": 4}, 2, "4 replicas take 4"),
     ({"num_replicas": 2, "promotable": True}, 1, "2 replicas take 2"),
     ({"num_replicas": 2, "tensor_parallel": 2}, 3, "2 replicas take 4"),
     ({"num_replicas": 2}, 2, None), ({"models": {"a": "x", "b": "y"}}, 1, None)],
)  # fmt: skip
def test_replicas_that_the_cluster_has_no_gpus_for_are_told(
    more: dict[str, Any], num_gpus: int, taken: str | None
) -> None:
    told = str(with_gpus(spec(**more), num_gpus)[1])
    assert ("waits for it" in told) == (taken is not None)
    assert taken is None or taken in told


@pytest.mark.parametrize(
    ("more", "num_gpus", "percent"),
    [({"gpus_per_replica": 0}, 0, 25), ({"gpus_per_replica": 1}, 1, 0), ({"gpus_per_replica": 1}, 2, 25),
     ({"gpus_per_replica": 0.5}, 1, 25), ({"gpus_per_replica": 0.6}, 1, 0),
     ({"gpus_per_replica": 0.5, "num_replicas": 2}, 1, 0),
     ({"gpus_per_replica": 1, "num_replicas": 5}, 5, 0), ({"gpus_per_replica": 1, "num_replicas": 5}, 6, 25),
     ({"gpus_per_replica": 4}, 7, 0), ({"gpus_per_replica": 4}, 8, 25),
     ({"gpus_per_replica": 1}, 0, 25), ({"gpus_per_replica": 1, "num_replicas": 4}, 2, 25),  # which are still to come
     ({"gpus_per_replica": 1, "max_replicas": 4}, 4, 25)],
)  # fmt: skip
def test_an_update_starts_no_replica_first_where_no_gpu_is_left_for_it(
    more: dict[str, Any], num_gpus: int, percent: int
) -> None:
    found, told = surge_percent(spec(**more), num_gpus)
    assert found == percent
    assert (told is None) == (percent > 0)


@pytest.mark.parametrize(
    ("num_models", "more", "devices", "fractions"),
    [
        (1, {}, [()], [0.9]),
        (2, {}, [(), ()], [0.45, 0.45]),  # on a CPU
        (1, {"gpus_per_replica": 0.5}, [()], [0.45]),
        (2, {"gpus_per_replica": 0.5}, [(), ()], [0.225, 0.225]),
        (2, {"gpus_per_replica": 1}, [(), ()], [0.45, 0.45]),
        (2, {"gpus_per_replica": 2}, [(0,), (1,)], [0.9, 0.9]),
        (3, {"gpus_per_replica": 2}, [(0,), (1,), (0,)], [0.45, 0.9, 0.45]),
        (2, {"gpus_per_replica": 8, "tensor_parallel": 4}, [(0, 1, 2, 3), (4, 5, 6, 7)], [0.9, 0.9]),
        (1, {"gpus_per_replica": 4, "tensor_parallel": 4}, [()], [0.9]),
    ],
)
def test_models_of_a_replica_have_gpus_of_their_own_where_there_are_enough(
    num_models: int, more: dict[str, Any], devices: list[tuple[int, ...]], fractions: list[float]
) -> None:
    made = spec(models={f"m{number}": "x" for number in range(num_models)}, **more)
    options = [engine_options(made, "x", number) for number in range(num_models)]
    assert [one.device_ids for one in options] == devices
    assert [one.gpu_memory_fraction for one in options] == pytest.approx(fractions)


def test_local_loads_a_model_onto_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    two = spec(models={"a": "x", "b": "y"}, gpus_per_replica=2)
    assert [local._device(engine_options(two, "x", number)) for number in (0, 1)] == [
        torch.device("cuda", 0), torch.device("cuda", 1),
    ]  # fmt: skip
    assert local._device(EngineOptions(device="cuda")) == torch.device("cuda")
    assert local._device(EngineOptions(device="cpu", device_ids=(1,))) == torch.device("cpu")


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
    monkeypatch.setattr(app, "chosen", lambda spec, _: spec)
    monkeypatch.setattr(app, "_num_gpus", lambda: 0)
    monkeypatch.setattr(app, "session", session)
    monkeypatch.setattr(app.ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(process, "check_port", lambda *_: None)
    monkeypatch.setattr(controller, "serving", no_further)
    with pytest.raises(ServeError, match="far enough"):
        app.serve_in_background(spec(host=host))
    assert ("asks for no token" in capsys.readouterr().err) == is_told
