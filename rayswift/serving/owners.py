"""Whether the process that wrote a record of itself still runs: by its host, its number and when it began.

Knows /proc, signals and sockets. What is recorded, and where, is known by `serving/registry.py`.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

_KNOCK_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Process:
    """One process of some machine. Numbers are given again: `started` tells two processes of one number apart."""

    host: str
    pid: int
    started: int | None
    """In clock ticks since its machine began; None where that cannot be known."""

    def runs(self, address: str) -> bool:
        """Whether it runs; where that is on another machine, whether something listens at its `address` HOST:PORT."""
        if self.host != socket.gethostname():
            return _listens(address)
        return _exists(self.pid) and self.started in (None, started(self.pid))


def this_process() -> Process:
    """The one that asks."""
    return Process(socket.gethostname(), os.getpid(), started(os.getpid()))


def started(pid: int) -> int | None:
    """When a process of this machine began, as `Process.started`; -1 for one that has ended and is not buried yet."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if fields[0] == "Z" else int(fields[19])


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _listens(address: str) -> bool:
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_TIMEOUT_S).close()
    except (OSError, ValueError):
        return False
    return True
