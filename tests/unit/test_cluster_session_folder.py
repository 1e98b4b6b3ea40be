"""The folder of a local session: private, short enough, and nothing of HAProxy outlives it."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rayswift.cluster import session_folder
from rayswift.cluster.session_folder import end_haproxy, haproxy_files, make_folder
from rayswift.errors import ConfigError
from tests.promotion_cases import until

_SOCKETS = {
    False: "r/session_2026-11-30_08-26-15_516268_4194304/sockets/plasma_store",  # ids of programs end there on Linux
    True: f"{'f' * 56}/a.4194304.tmp",
}


@pytest.fixture
def place() -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="p") as name:
        yield name


@pytest.mark.parametrize("haproxy", [False, True])
def test_the_deepest_place_that_is_taken_has_room_for_every_socket(
    haproxy: bool, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = ""
    for length in range(1, 100):
        deep = os.path.join(place, "d" * length)
        os.mkdir(deep)
        monkeypatch.setenv("RAYSWIFT_TMPDIR", deep)
        try:
            folder = make_folder(haproxy=haproxy)
        except ConfigError as error:
            refused = str(error)
            break
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        path = Path(folder, _SOCKETS[haproxy])
        path.parent.mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    assert length > 5
    assert refused.startswith(f"RAYSWIFT_TMPDIR={deep} is 1 bytes too long")


def test_a_deep_place_that_nobody_chose_for_ray_is_left_for_tmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYSWIFT_TMPDIR", raising=False)
    monkeypatch.setattr(session_folder.tempfile, "gettempdir", lambda: "/var/" + "x" * 90)
    folder = make_folder(haproxy=False)
    os.rmdir(folder)
    assert os.path.dirname(folder) == "/tmp"


def test_what_a_session_left_of_haproxy_ends_and_nothing_else(place: str) -> None:
    mine, other = (os.path.join(place, name, "haproxy.cfg") for name in ("rs-a", "rs-b"))
    commands = {
        "mine": ["-db", "-f", mine],
        "of another session": ["-db", "-f", other],
        "one that checks it": ["-c", "-f", mine],
    }
    started = {
        name: subprocess.Popen([_waiting(place), *words], stdin=subprocess.PIPE) for name, words in commands.items()
    }
    try:
        assert end_haproxy(os.path.join(place, "rs-a")) == [started["mine"].pid]
        assert started["mine"].wait(10) == -9
        assert [name for name, process in started.items() if process.poll() is None] == [
            "of another session",
            "one that checks it",
        ]
    finally:
        for process in started.values():
            process.kill()
            process.communicate()


def _waiting(place: str) -> str:
    """An executable that takes any words, as HAProxy does, and waits until its input ends."""
    program = Path(place, "haproxy")
    if not program.exists():
        program.write_text("#!/bin/sh\nread word\n")
        program.chmod(0o700)
    return str(program)


def test_haproxys_files_lie_in_the_folder(place: str) -> None:
    assert {os.path.dirname(path) for path in haproxy_files(place).values()} == {place}


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal for it is Linux's")
def test_haproxy_ends_when_what_started_it_is_killed(place: str) -> None:
    program = haproxy_files(place)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    config, door = Path(place, "haproxy.cfg"), Path(place, "door")
    config.write_text(f"defaults\n  timeout client 1s\nfrontend f\n  mode http\n  bind unix@{door}\n")
    start = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); input()"
    command = [sys.executable, "-c", start, program, "-db", "-f", str(config)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        process = psutil.Process(int(parent.stdout.readline()))
        until(door.exists, "HAProxy listens", 10)
        assert process.cmdline()[1:] == ["-db", "-f", str(config)]
        parent.kill()
    until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, "HAProxy ends", 10)
