"""Endpoints and promotions as processes of their own, as a user runs them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml


def start(*arguments: str, out: IO[str]) -> subprocess.Popen[str]:
    """The command, with all that it says in `out`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rayswift.cli", *arguments]
    return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, text=True)


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    """The exit code of `rayswift serve ...` and what it has said."""
    with (folder / "log").open("w") as out:
        process = start("serve", *arguments, out=out)
        try:
            code = process.wait(240)
        finally:
            process.kill()  # nothing to one that has ended; another would hold the lock of its promotion
    return code, (folder / "log").read_text()


def until(condition: Callable[[], Any], what: str, timeout_s: float = 120) -> None:
    """Returns once it holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        threading.Event().wait(0.05)


def write_spec(folder: Path, models: Mapping[str, Path], port: int, engine: str = "local") -> str:
    """The serve spec of a promotable endpoint."""
    spec = {"models": {name: str(export) for name, export in models.items()}, "port": port, "engine": engine,
            "device": "cpu", "max_model_len": 512, "promotable": True, "cpus_per_replica": 0.5}  # fmt: skip
    (file := folder / "serve.yaml").write_text(yaml.safe_dump(spec))
    return str(file)


@contextmanager
def serving(folder: Path, spec: str) -> Iterator[None]:
    """An endpoint that answers for the duration, and ends well."""
    log = folder / "log"
    with log.open("w") as out:
        running = start("serve", spec, out=out)
        try:
            until(lambda: "Serving" in log.read_text() or running.poll() is not None, "the endpoint answers", 240)
            assert running.poll() is None, log.read_text()
            yield
        finally:
            running.send_signal(signal.SIGTERM)
            assert running.wait(120) == 0, log.read_text()
