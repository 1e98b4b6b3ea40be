"""The lock of an open file or folder, by which processes of one machine write one after the other."""

from __future__ import annotations

import time
from typing import IO, Any

_POLL_S = 0.05


def taken(file: int | IO[Any], wait_s: float) -> bool:
    """Take the exclusive lock of an open file; False when another still holds it after `wait_s`.

    It ends with the file, and with the process, however that ends. On a file system of several machines it may hold on
    this one alone.
    """
    import fcntl

    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
