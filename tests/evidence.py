"""What a kept measurement says about itself: command, commit, versions, hardware, date."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "transformers", "peft", "deepspeed", "bitsandbytes")


def header() -> list[str]:
    """The first lines of a result, `name  value` each."""
    lines = {
        "command": f"python {' '.join([str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]])}",
        "commit": _commit(),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "versions": f"Python {platform.python_version()}, {', '.join(filter(None, map(_version, _PACKAGES)))}",
        "hardware": f"{os.cpu_count()} {platform.machine()} cores, {_memory_gib()} GiB, no accelerator used; "
        f"load {os.getloadavg()[0]:.1f} at the start",
    }
    return [f"{name:10}{value}" for name, value in lines.items()]


def kept(name: str, suffix: str = "txt") -> Path:
    """Where today's result of a measurement is kept."""
    return ROOT / "bench" / f"{name}.{datetime.now(UTC):%Y-%m-%d}.{suffix}"


def _commit() -> str:
    """The commit, and whether files of the product or of the suites differ from it."""
    commit = _git("rev-parse", "--short", "HEAD")
    return f"{commit} with local changes" if _git("status", "--porcelain", "rayswift", "tests") else commit


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return f"{package} {version(package)}"
    except Exception:  # an extra that is not installed
        return None


def _memory_gib() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
