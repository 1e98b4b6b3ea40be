"""What this machine can do: versions, devices, memory, disk, Ray. Each finding says how to mend it.

Looks and reports; changes nothing.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rayswift.units import format_bytes

Status = Literal["ok", "warning", "problem"]
_MARKS: dict[Status, str] = {"ok": "ok  ", "warning": "warn", "problem": "FAIL"}
_MIN_DISK_BYTES, _MIN_SHM_BYTES, _MIN_MEMORY_BYTES = 5 * 2**30, 2**30, 4 * 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `fix` is empty when nothing is to be done."""

    what: str
    status: Status
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Checkup:
    """All findings, in the order they were made."""

    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether training can work here."""
        return not any(finding.status == "problem" for finding in self.findings)

    def to_plain(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {"healthy": self.healthy, "findings": [asdict(finding) for finding in self.findings]}

    def summary(self) -> str:
        """A line per finding, with the fix below it."""
        lines = []
        for finding in self.findings:
            lines.append(f"{_MARKS[finding.status]}  {finding.what:<18} {finding.found}")
            if finding.fix:
                lines.append(f"{'':26}-> {finding.fix}")
        return "\n".join([*lines, "", "ready to train" if self.healthy else "mend the lines marked FAIL first"])


def examine(*, start_ray: bool = True, constraints: Path | None = None) -> Checkup:
    """The findings on this machine. `start_ray` also starts a small cluster, in about 10 s, and stops it again."""
    checks: list[Callable[[], Iterable[Finding]]] = [_python, lambda: _packages(constraints), _extras, _compute, _room]
    findings = [finding for check in checks for finding in check()]
    if start_ray and not any(f.status == "problem" for f in findings):
        findings.append(_ray())
    return Checkup(tuple(findings))


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    fine = (3, 11) <= sys.version_info[:2] <= (3, 12)
    yield Finding("python", "ok" if fine else "problem", f"{version} at {sys.executable}",
                  "" if fine else "use Python 3.11 or 3.12")  # fmt: skip


def _packages(constraints: Path | None) -> Iterator[Finding]:
    """The packages RaySwift needs, against constraints.txt where there is one."""
    wanted = _pins(constraints or Path(__file__).resolve().parent.parent / "constraints.txt")
    missing, other = [], []
    for name in _requirements():
        try:
            version = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        pinned = wanted.get(name.lower())
        if pinned and pinned != version:
            other.append(f"{name} {version} (tested: {pinned})")
    if missing:
        yield Finding("packages", "problem", f"missing: {', '.join(missing)}", "run make setup")
    if other:
        yield Finding("packages", "warning", ", ".join(other), "run make setup for the tested versions")
    if not missing and not other:
        yield Finding(
            "packages", "ok", ", ".join(f"{n} {metadata.version(n)}" for n in ("ray", "torch", "transformers"))
        )


def _requirements(extra: str | None = None) -> list[str]:
    """Names of the packages that RaySwift, or one of its extras, asks for."""
    import re

    try:
        lines = metadata.requires("rayswift") or []
    except metadata.PackageNotFoundError:  # run from a checkout that was not installed
        lines = ["ray", "torch", "transformers", "peft", "pydantic", "typer", "pyarrow", "safetensors"]
    mine = [line for line in lines if (f'extra == "{extra}"' in line if extra else "extra ==" not in line)]
    return [match[0] for line in mine if (match := re.match(r"[\w.-]+", line))]


def _pins(file: Path) -> dict[str, str]:
    """`{"ray": "2.60.0"}` from a constraints file; empty where there is none (an installed wheel)."""
    if not file.is_file():
        return {}
    lines = (line.split("==") for line in file.read_text().splitlines() if "==" in line and line[0] != "#")
    return {name.strip().lower(): version.strip() for name, version in lines}


def _extras() -> Iterator[Finding]:
    """Optional extras, by whether their packages are there. Absent ones are no fault."""
    found: list[str] = []
    absent: list[str] = []
    for extra in ("deepspeed", "flash", "gcs", "mlflow", "s3", "trackio", "vllm", "wandb"):
        packages = _requirements(extra)
        (found if packages and all(_installed(name) for name in packages) else absent).append(extra)
    yield Finding("extras", "ok", f"installed: {', '.join(found) or 'none'}; not installed: {', '.join(absent)}")


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _compute() -> Iterator[Finding]:
    """CPUs, and accelerators as torch sees them."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("cpus", "ok" if cpus > 1 else "warning", str(cpus),
                  "" if cpus > 1 else "Ray Data and the worker share one core; expect it to be slow")  # fmt: skip
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("torch", "problem", f"cannot be imported: {error}", "run make setup")
        return
    if not torch.accelerator.is_available():
        fix = "install a CUDA build of torch" if Path("/dev/nvidia0").exists() else ""
        yield Finding("accelerator", "warning" if fix else "ok", "none; training runs on the CPU", fix)
        return
    kind = torch.accelerator.current_accelerator()
    yield Finding("accelerator", "ok", f"{torch.accelerator.device_count()} x {kind}")


def _room() -> Iterator[Finding]:
    """Memory, shared memory for Ray's object store, and disk."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        yield _size("memory", memory, _MIN_MEMORY_BYTES, "close other programs; small models need about 2 GiB")
    if Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free
        yield _size("/dev/shm", free, _MIN_SHM_BYTES, "in a container, start it with --shm-size=2g")
    yield _disk(os.getcwd(), "work in another folder")
    if (temporary := os.environ.get("TMPDIR", "/tmp")) != os.getcwd():
        yield _disk(temporary, "make that folder, or unset TMPDIR")


def _disk(folder: str, otherwise: str) -> Finding:
    what = f"disk {folder}"[-18:]
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding(what, "problem", f"{folder}: {error.strerror}", otherwise)
    return _size(what, free, _MIN_DISK_BYTES, f"free space below {folder}")


def _size(what: str, size: int, least: int, fix: str) -> Finding:
    enough = size >= least
    return Finding(what, "ok" if enough else "warning", format_bytes(size), "" if enough else fix)


def _ray() -> Finding:
    """Whether a local cluster starts, and how long that takes."""
    import time

    started = time.monotonic()
    try:
        from rayswift.cluster.session import cluster_spec, session

        with session("local"):
            spec = cluster_spec("auto")
    except Exception as error:  # whatever it is, it is the finding
        reason = " ".join(str(error).split())[:200]
        return Finding("ray", "problem", f"does not start: {type(error).__name__}: {reason}",
                       "check /dev/shm, free ports and the disk below the temp folder")  # fmt: skip
    seconds = time.monotonic() - started
    return Finding("ray", "ok", f"a local cluster starts in {seconds:.1f} s: {spec.num_cpus:g} CPUs, {spec.device}")
