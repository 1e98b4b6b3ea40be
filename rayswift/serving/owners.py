"""Whether the process that wrote a record of itself still runs: by its host, its number and when it began.

Knows /proc, signals and sockets. What is recorded, and where, is known by `serving/registry.py`.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

_KNOCK_TIMEOUT_S = 5.0
_LOOPBACK = ("127.0.0.1", "[::1]", "localhost")


@dataclass(frozen=True)
class Process:
    """One process of some machine. Numbers are given again: `started` tells two processes of one number apart."""

    host: str
    pid: int
    started: int | None
    """In clock ticks since its machine began; None where that cannot be known."""

    def runs(self, address: str) -> bool | None:
        """Whether it runs; where that is on another machine, whether something listens at its `address` HOST:PORT.

        None where that cannot be told from here.
        """
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


def _listens(address: str) -> bool | None:
    """Only a machine that refuses says that nothing does: one that is silent, or not found, may be kept from us."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host in _LOOPBACK:
        return None  # it is that machine's own, and here it is ours
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_TIMEOUT_S).close()
    except ConnectionRefusedError:
        return False
    except (OSError, ValueError):
        return None
    return True
