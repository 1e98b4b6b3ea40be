"""Whether a process that was written down still runs: another one of its number is not it."""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import replace

import pytest

from rayswift.serving.owners import Process, started, this_process

_NOWHERE = "127.0.0.1:1"


def test_this_process_runs_and_no_other_of_its_number() -> None:
    mine = this_process()
    assert (mine.host, mine.pid) == (socket.gethostname(), os.getpid())
    assert mine.started is not None
    assert mine.runs(_NOWHERE)
    assert replace(mine, started=None).runs(_NOWHERE)  # as far as can be known
    assert not replace(mine, started=mine.started - 1).runs(_NOWHERE)


def test_a_process_that_has_ended_does_not_run_buried_or_not() -> None:
    ended = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    found = Process(socket.gethostname(), ended.pid, started(ended.pid))
    assert found.runs(_NOWHERE)
    assert ended.stdin is not None
    ended.stdin.close()
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is still there for who asks how
    assert not found.runs(_NOWHERE)
    ended.wait()
    assert started(ended.pid) is None
    assert not found.runs(_NOWHERE)


def test_a_process_of_another_machine_runs_while_its_address_is_listened_at() -> None:
    elsewhere = Process("elsewhere.invalid", 1, 1)
    with socket.create_server(("127.0.0.2", 0)) as server:
        port = server.getsockname()[1]
        address = f"127.0.0.2:{port}"
        assert elsewhere.runs(address)
        assert elsewhere.runs(f"127.0.0.1:{port}") is None  # not its own
    assert elsewhere.runs(address) is False  # refused


@pytest.mark.parametrize("failure", [TimeoutError(), OSError(113, "No route to host"), socket.gaierror(-2, "unknown")])
def test_a_machine_that_is_not_reached_may_run_it(monkeypatch: pytest.MonkeyPatch, failure: OSError) -> None:
    def silent(*_: object, **__: object) -> socket.socket:
        raise failure

    elsewhere = Process("elsewhere.invalid", 1, 1)
    assert elsewhere.runs("auto") is None
    monkeypatch.setattr(socket, "create_connection", silent)
    assert elsewhere.runs("192.0.2.1:6379") is None
