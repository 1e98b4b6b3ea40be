"""Starts DeepSpeed, and builds ahead of time the one compiled extension this engine uses: asynchronous reads for NVMe.

    python -m rayswift.parallel.deepspeed_ops        # or: make deepspeed-ops

ZeRO and offload to the host need no extension here: the optimizer is torch's own, fused on the CPU too. DeepSpeed would
otherwise compile in the middle of a run, for minutes, behind a lock that a killed build leaves behind.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift.errors import ConfigError

if TYPE_CHECKING:
    import torch

OPS = ("pin_memory", "async_io")  # in the order they are loaded: the second needs symbols of the first
_BUILD_TIMEOUT_S = 1800
# Without debug symbols, which take half of the time: -g0 overrules the -g before it.
_BUILD = """
from deepspeed.ops.op_builder import AsyncIOBuilder, PinMemoryBuilder
for kind in (PinMemoryBuilder, AsyncIOBuilder):
    builder = kind()
    flags = builder.cxx_args()
    builder.cxx_args = lambda: [*flags, "-g0"]
    builder.load(verbose=True)
"""
# What is meant so, and a skipped step, which the run reports itself.
_NOISE = ("Setting accelerator to CPU", "You are using ZeRO with an untested optimizer", "OVERFLOW! Skipping step")


def start(device: torch.device) -> Any:
    """The module deepspeed, quiet below warnings and set to this kind of device. Raises ConfigError if it is absent."""
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    # torch 2.13 renamed what DeepSpeed 0.19 calls in every gather
    warnings.filterwarnings("ignore", message=r"`torch.distributed.\w+` is deprecated", category=FutureWarning)
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"cannot be loaded: {error}",
            path="parallel.engine",
            value="deepspeed",
            fix="pip install rayswift[deepspeed]",
        ) from error
    if device.type == "cpu":
        _use_cpu()
    return deepspeed


def _is_news(record: logging.LogRecord) -> bool:
    return not any(text in str(record.msg) for text in _NOISE)


def _use_cpu() -> None:
    """DeepSpeed on the CPU without the collectives it would compile for two minutes: they serve inference only."""
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Host(CPU_Accelerator):  # type: ignore[misc]
        def create_op_builder(self, op_name: str) -> Any:
            return None if op_name == "ShareMemCommBuilder" else super().create_op_builder(op_name)

        def is_fp16_supported(self) -> bool:
            return True  # by torch, slowly; DeepSpeed asks for instructions that make it fast

    set_accelerator(Host())


def folder() -> Path:
    """Where the extensions of this environment lie; another torch, DeepSpeed or Python has another folder."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Path(sys.prefix) / "deepspeed-ops" / f"{version('deepspeed')}-torch-{version('torch')}-python-{python}"


def missing() -> list[str]:
    """The extensions that are not built."""
    return [name for name in OPS if not _file(name).exists()]


def load_ops() -> None:
    """Hand the built extensions to DeepSpeed, which then compiles nothing. Raises ConfigError when there are none."""
    if missing():
        raise ConfigError(
            f"needs DeepSpeed's extension {missing()[-1]}, which is not built in {folder()}",
            path="parallel.nvme",
            fix="run `python -m rayswift.parallel.deepspeed_ops` on every node, once",
        )
    from deepspeed.ops.op_builder import PinMemoryBuilder
    from deepspeed.ops.op_builder.builder import OpBuilder

    for name in OPS:
        if name not in OpBuilder._loaded_ops:
            spec = spec_from_file_location(name, _file(name))
            assert spec is not None
            assert spec.loader is not None
            OpBuilder._loaded_ops[name] = module_from_spec(spec)
            spec.loader.exec_module(OpBuilder._loaded_ops[name])
            PinMemoryBuilder().load()  # makes its symbols visible to the next one


def build() -> str:
    """One line about what was done: built, there already, or skipped and why. Raises RuntimeError when it fails."""
    if not missing():
        return f"DeepSpeed's extensions are there already: {folder()}"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"skipped: no C++ compiler {compiler!r}, so no offload to NVMe; install one (Debian: apt install g++)"
    if not _has_header(compiler, "libaio.h"):
        return "skipped: libaio.h is missing, so no offload to NVMe; install it (Debian: apt install libaio-dev)"
    began = time.monotonic()
    folder().mkdir(parents=True, exist_ok=True)
    with open(folder() / "building", "w") as mine:
        fcntl.flock(mine, fcntl.LOCK_EX)  # whoever holds it is the only one that builds here ...
        for lock in folder().glob("*/lock"):  # ... so a lock of torch's was left by a build that was killed
            lock.unlink()
        print(f"building DeepSpeed's {' and '.join(OPS)} once, a few minutes: {folder()}", flush=True)
        _compile()
    return f"built in {time.monotonic() - began:.0f} s: {folder()}"


def _compile() -> None:
    """torch's own build in a process of its own, which can be given an environment and a bound.

    The linker is told folders as they are, and one with a space is two to it: the build sees the Python environment
    through a link without any.
    """
    log = folder() / "build.log"
    with open(log, "w") as stream, tempfile.TemporaryDirectory(prefix="rayswift-ops-") as place:
        prefix = Path(place, "env")
        prefix.symlink_to(sys.prefix)
        python = prefix / Path(sys.executable).relative_to(sys.prefix)
        environment = {
            **os.environ,
            "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",  # ninja is installed beside python
            "TORCH_EXTENSIONS_DIR": str(prefix / folder().relative_to(sys.prefix)),
            "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 1)),
        }
        done = subprocess.run(
            [python, "-c", _BUILD], env=environment, stdout=stream, stderr=stream, timeout=_BUILD_TIMEOUT_S
        )
    if done.returncode or missing():
        raise RuntimeError(f"could not build DeepSpeed's {', '.join(missing())}; the log is {log}")


def _file(name: str) -> Path:
    return folder() / name / f"{name}.so"


def _has_header(compiler: str, name: str) -> bool:
    command = [compiler, "-E", "-x", "c++", "-include", name, os.devnull]
    return subprocess.run(command, capture_output=True, timeout=60).returncode == 0


if __name__ == "__main__":
    try:
        print(build())
    except RuntimeError as error:
        sys.exit(str(error))
