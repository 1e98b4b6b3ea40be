"""Steps that every quickstart has: job files written and run as a user would, times, and the command to go on with."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift import api
from rayswift.config import yamlfile
from rayswift.config.load import load_job
from rayswift.progress import Progress

if TYPE_CHECKING:
    from rayswift.training.report import RunReport


def write_job(path: Path, comment: str, job: dict[str, Any]) -> None:
    """Paths in a job are relative to the directory that `rayswift train` is called in, so they are written as given."""
    path.write_text(f"# {comment}\n{yamlfile.dump(job)}", encoding="utf-8")


def train(job: Path, progress: Progress) -> RunReport:
    """The report of a job that was run exactly as `rayswift train` would."""
    progress.phase(f"rayswift train {job}")
    return api.run(load_job(str(job)).job, progress=progress)


def free_port() -> int:
    """A port nobody listens on: the quickstart must not fail because 8000 is taken."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - started, 1)


def command() -> str:
    """`rayswift` as this user can type it, whether or not the environment is activated."""
    return "rayswift" if shutil.which("rayswift") else os.path.relpath(Path(sys.executable).parent / "rayswift")
