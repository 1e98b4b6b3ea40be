"""Which engine serves a spec, and the Python environment that its process runs in.

An engine may need packages that clash with ours (vLLM pins torch), and then lives in an environment of its own with the
same Python and Ray. Knows how that environment is found and what speaks against it; imports nothing of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rayswift import plugins
from rayswift.errors import ConfigError
from rayswift.models.processor import has_processor
from rayswift.serving.spec import ServeSpec
from rayswift.serving.vllm import cpu, media

VARIABLE = "RAYSWIFT_SERVE_PYTHON"
_PLACE = Path(__file__).resolve().parents[2] / ".venv-serve/bin/python"
_FIX = "run `make serve-env` in the checkout"
_PROBE = """
import importlib.metadata as m, json, sys
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
print(json.dumps({"python": "%d.%d.%d" % sys.version_info[:3], **{n: version(n) for n in sys.argv[1:]}}))
"""
_PROBE_TIMEOUT_S = 60


@dataclass(frozen=True)
class Interpreter:
    """A Python executable for an engine's process, or why there is none that can be used."""

    path: str
    problem: str | None = None
    version: str | None = None
    """Of the engine, where it comes as a package and can be used; a build of vLLM for CPUs ends in +cpu."""


def resolved(spec: ServeSpec) -> tuple[ServeSpec, str | None]:
    """The spec with its engine and the engine's interpreter, and for a person why `auto` did not take vLLM.

    Raises ConfigError for an engine that this machine cannot run, or where only vLLM can do what the spec asks for.
    """
    if spec.engine != "auto":
        return spec.model_copy(update={"engine_python": _needed(spec)}), None
    found = interpreter_of("vllm", spec.engine_python)
    reason = found.problem or _other_build(spec, found.version) or _better_local(spec, found.path)
    if reason is None:
        return spec.model_copy(update={"engine": "vllm", "engine_python": found.path}), None
    if asks := _only_vllm(spec):
        raise ConfigError(f"needs engine vllm: {reason}", path=asks, fix=_FIX)
    local = spec.model_copy(update={"engine": "local", "engine_python": None})
    return local, f"engine local serves: {reason}"


def interpreter_of(engine: str, given: str | None) -> Interpreter:
    """The interpreter whose environment holds the engine: as given, of RAYSWIFT_SERVE_PYTHON, or .venv-serve's."""
    made = plugins.load("serving.engines", engine, path="engine")
    distribution = getattr(made, "distribution", None)
    if distribution is None:
        return Interpreter(given or sys.executable)
    path = given or os.environ.get(VARIABLE) or str(_PLACE)
    if not os.access(path, os.X_OK):
        return Interpreter(path, f"there is no environment for {engine} ({path} does not exist; {_FIX})")
    try:
        versions = _versions(path, distribution)
    except subprocess.CalledProcessError as error:
        return Interpreter(path, f"{path} cannot be run as Python: it ended with {error.returncode}")
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return Interpreter(path, f"{path} cannot be run: {' '.join(str(error).split())[:200]}")
    problem = _clash(path, versions, distribution, getattr(made, "release", None))
    return Interpreter(path, problem, None if problem else versions[distribution])


def is_for_cpus(version: str | None) -> bool:
    """Whether a version of vLLM is that of a build for CPUs; one from source says so last: 0.32.1.dev3+g12ab34c.cpu."""
    return version is not None and version.partition("+")[2].split(".")[-1] == "cpu"


def lacks_for_images(python: str) -> str | None:
    """Why vLLM of this interpreter's environment cannot load models of images; None where it can."""
    if _versions(python, media.LIBRARY)[media.LIBRARY] is not None:
        return None
    return f"{python} has no {media.LIBRARY}, which vLLM needs for images"


def _needed(spec: ServeSpec) -> str | None:
    """The interpreter of an engine asked for by name; None is our own."""
    found = interpreter_of(spec.engine, spec.engine_python)
    if found.problem:
        raise ConfigError(f"cannot run here: {found.problem}", path="engine", value=spec.engine, fix=_FIX)
    if reason := _other_build(spec, found.version):
        raise ConfigError(f"cannot run here: {reason}", path="engine", value=spec.engine, fix="use auto or local")
    return None if found.path == sys.executable else found.path


def _versions(python: str, distribution: str) -> dict[str, str | None]:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    command = [python, "-c", _PROBE, "ray", distribution, "rayswift"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, env=clean, check=True)
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


def _clash(path: str, theirs: Mapping[str, str | None], distribution: str, release: str | None) -> str | None:
    """Why processes of that environment cannot work in a Ray cluster of ours; None where they can.

    `release` are the first numbers of the version that our engine was written for: it uses what others may not have.
    """
    import importlib.metadata

    for name in (distribution, "ray", "rayswift"):
        if theirs[name] is None:
            return f"{path} has no {name}; {_FIX}"
    ours = {"python": "{}.{}.{}".format(*sys.version_info[:3]), "ray": importlib.metadata.version("ray")}
    for name, version in ours.items():
        if theirs[name] != version:
            return f"{path} has {name} {theirs[name]}, and one cluster needs the same everywhere, {version}; {_FIX}"
    if release is not None and not f"{theirs[distribution]}.".startswith(f"{release}."):
        return f"{path} has {distribution} {theirs[distribution]}, and this works with {release} alone; {_FIX}"
    return None


def _other_build(spec: ServeSpec, version: str | None) -> str | None:
    """Why this build of vLLM is not for the devices of the spec's replicas; None where it is, or there is none.

    Replicas with GPUs are on other nodes where this one has none (the head of a cluster), and so is their build.
    """
    if version is None:
        return None
    if spec.gpus:
        if is_for_cpus(version) and has_gpu():
            has = f"replicas have {spec.gpus:g} GPUs each"
            return f"{has}, and vllm {version} is a build for CPUs ({_FIX}, or set device: cpu)"
        return None
    if is_for_cpus(version):
        return f"device=cuda, and vllm {version} is a build for CPUs" if spec.device == "cuda" else None
    return f"replicas have no GPU, and vllm {version} is a build for GPUs"


def has_gpu() -> bool:
    """Whether this machine has a GPU that torch can use."""
    import torch

    return torch.cuda.is_available()


def _better_local(spec: ServeSpec, python: str) -> str | None:
    """Why a spec is better served by `local` although vLLM is here, in the environment of this interpreter."""
    seeing = {name: folder for name, folder in spec.models.items() if os.path.isdir(folder) and has_processor(folder)}
    if seeing and spec.max_media:
        beside = dict.fromkeys(spec.adapters, "engine vllm is given text alone of such a model with adapters")
        for name, folder in seeing.items():
            reason = beside.get(name) or media.refusal(folder) or media.misnamed(folder) or lacks_for_images(python)
            if reason is not None:
                return f"{name} takes images or sounds, and {reason}"
    if spec.device not in ("auto", "cpu", "cuda"):
        return f"device={spec.device} is not among those of vLLM"
    return None if spec.gpus else _lacking_on_cpu(spec)


def _lacking_on_cpu(spec: ServeSpec) -> str | None:
    """What vLLM lacks on this CPU for a model of the spec; None where it runs all."""
    for name, folder in spec.models.items():
        if reason := cpu.lacks_heads(folder) or (cpu.lacks_packed() if cpu.is_packed(folder) else None):
            return f"{name} cannot run there: {reason}"
    return None


def _only_vllm(spec: ServeSpec) -> str | None:
    """The first setting that only engine vllm can follow."""
    asked = {"adapters": bool(spec.adapters), "tensor_parallel": spec.tensor_parallel > 1}
    return next((name for name, wanted in asked.items() if wanted), None)
