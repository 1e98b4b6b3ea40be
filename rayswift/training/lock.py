"""One writer per run directory: two sessions of one run would remove and prune each other's checkpoints."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from rayswift.errors import CheckpointError
from rayswift.locks import taken
from rayswift.training.run_dir import RunDir

LOCK = ".lock"
_WAIT_S = 60.0  # as long as the workers of a killed driver may take to end


@contextmanager
def sole_writer(run_dir: RunDir, *, wait_s: float = _WAIT_S) -> Iterator[None]:
    """Hold the run directory for the duration; the lock ends with the process, however that ends.

    Raises CheckpointError when another session still holds it after `wait_s`. Object stores have no locks: there
    nothing is held.
    """
    if not run_dir.is_local:
        yield
        return
    run_dir.fs.makedirs(run_dir.root, exist_ok=True)
    with open(run_dir.path(LOCK), "a+", encoding="utf-8") as file:
        if not taken(file, wait_s):
            file.seek(0)
            raise CheckpointError(
                f"is being trained by another session ({file.read()})",
                path="run",
                value=run_dir.url,
                fix="wait for it, stop it, or give this job another name",
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
