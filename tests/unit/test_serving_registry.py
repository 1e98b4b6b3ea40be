"""The registry of versions: states and history, what a hand may write into it, and one writer at a time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayswift.errors import ConfigError
from rayswift.serving import registry
from rayswift.serving.owners import Process, started, this_process
from rayswift.serving.registry import FILE, EndpointRecord

_A, _B = "a" * 12, "b" * 12


def test_a_promotion_and_a_rollback_are_written_down(tmp_path: Path) -> None:
    assert registry.read(tmp_path).models == {}
    registry.record(tmp_path, "m", _A, tmp_path / "v1", "live")
    registry.record(tmp_path, "m", _B, tmp_path / "v2", "candidate")
    found = registry.record(tmp_path, "m", _B, tmp_path / "v2", "live")
    assert (found.live, found.previous) == (_B, _A)
    assert [(one.id, one.folder, one.state) for one in found.versions] == [(_A, "v1", "retired"), (_B, "v2", "live")]
    found = registry.record(tmp_path, "m", _A, tmp_path / "v1", "live", "rollback by hand")
    assert (found.live, found.previous) == (_A, _B)
    found = registry.record(tmp_path, "m", _B, tmp_path / "v2", "rolled-back", "1 of its 4 answers failed")
    assert [event.what for event in found.history] == [
        "live", "candidate", "live", "live: rollback by hand", "rolled-back: 1 of its 4 answers failed",
    ]  # fmt: skip
    assert registry.read(tmp_path).models == {"m": found}
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_what_a_hand_wrote_wrongly_is_told(tmp_path: Path) -> None:
    registry.record(tmp_path, "m", _A, tmp_path / "v1", "live")
    good = json.loads((tmp_path / FILE).read_text())
    for change, told in [
        ({"lives": _A}, "lives"),
        ({"live": _B}, f"live={_B} is not among its versions"),
        ({"versions": [{**good["models"]["m"]["versions"][0], "state": "gone"}]}, "gone is not one of live"),
        ({"live": None}, "make it retired"),
        ({"versions": good["models"]["m"]["versions"] * 2}, "one version twice"),
    ]:
        (tmp_path / FILE).write_text(json.dumps({"models": {"m": {**good["models"]["m"], **change}}}))
        with pytest.raises(ConfigError, match=told):
            registry.read(tmp_path)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(ConfigError, match=FILE):
        registry.read(tmp_path)


def test_only_one_changes_it_at_a_time(tmp_path: Path) -> None:
    refused = pytest.raises(ConfigError, match="another promotion or rollback")
    with registry.locked(tmp_path), refused, registry.locked(tmp_path):
        pass
    with registry.locked(tmp_path):
        pass
    with pytest.raises(ConfigError, match="cannot be written"), registry.locked(tmp_path / "absent"):
        pass


def test_the_record_of_the_endpoint_is_for_its_user_and_taken_back_by_who_wrote_it(tmp_path: Path) -> None:
    assert registry.read_endpoint(tmp_path) is None
    record = EndpointRecord(id="e", address="127.0.0.1:1", url="http://127.0.0.1:8000/v1", pid=os.getpid())
    registry.write_endpoint(tmp_path, record)
    assert (tmp_path / registry.ENDPOINT_FILE).stat().st_mode & 0o777 == 0o600
    registry.forget_endpoint(tmp_path, "another")
    assert registry.read_endpoint(tmp_path) == record
    registry.forget_endpoint(tmp_path, "e")
    assert registry.read_endpoint(tmp_path) is None


def test_what_an_endpoint_serves_is_announced_while_it_runs(tmp_path: Path) -> None:
    (home := tmp_path / "exports").mkdir()
    record = EndpointRecord(id="e", address="127.0.0.1:1", url="http://127.0.0.1:8000/v1", pid=os.getpid())
    served = {name: (_A, str(home / "v1")) for name in ("m", "n")}  # one export under two names
    with registry.announced(served, record):
        assert registry.read_endpoint(home) == record
        assert {name: found.live for name, found in registry.read(home).models.items()} == {"m": _A, "n": _A}
    assert registry.read_endpoint(home) is None
    with registry.announced({"m": (_A, str(home / "v1"))}, record):  # nothing new
        assert [one.what for one in registry.read(home).models["m"].history] == [
            "live: served from the start of the endpoint"
        ]
    with registry.announced({"m": (_B, str(home / "v2"))}, record):  # another one than was live
        found = registry.read(home).models["m"]
        assert (found.live, found.previous, found.get(_A).state) == (_B, _A, "retired")


def test_a_folder_that_is_being_changed_is_not_announced(tmp_path: Path) -> None:
    record = EndpointRecord(id="e", address="127.0.0.1:1", url="http://127.0.0.1:8000/v1", pid=os.getpid())
    refused = pytest.raises(ConfigError, match="another promotion or rollback")
    with registry.locked(tmp_path), refused, registry.announced({"m": (_A, str(tmp_path / "v1"))}, record):
        pass
    assert registry.read_endpoint(tmp_path) is None


def _record(process: Process, name: str) -> EndpointRecord:
    return EndpointRecord(id=name, address="127.0.0.1:1", url=f"http://{name}/v1", pid=process.pid, host=process.host,
                          started=process.started)  # fmt: skip


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs until its stdin is closed."""
    running = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    yield running
    running.kill()
    running.communicate()


def test_a_folder_has_one_endpoint_at_a_time(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    theirs = Process(socket.gethostname(), other.pid, started(other.pid))
    first, second = _record(theirs, "first"), _record(this_process(), "second")
    second = second.model_copy(update={"address": "127.0.0.1:2"})
    served = {"m": (_A, str(tmp_path / "v1"))}
    with registry.announced(served, first):
        refused = pytest.raises(
            ConfigError,
            match=rf"another endpoint that runs, the one at http://first/v1 \(process {other.pid} of .*; stop",
        )
        with refused, registry.announced({"n": (_B, str(tmp_path / "v2"))}, second):
            pass
        assert registry.read_endpoint(tmp_path) == first  # who is refused takes nothing with him
        assert set(registry.read(tmp_path).models) == {"m"}
        other.kill()
        other.wait()
        assert registry.stale_owner(tmp_path, second) == first
        with registry.announced(served, second):
            assert registry.read_endpoint(tmp_path) == second
            registry.forget_endpoint(tmp_path, "first")
            assert registry.read_endpoint(tmp_path) == second
    assert registry.stale_owner(tmp_path, second) is None


def test_who_has_taken_the_place_of_an_endpoint_is_not_taken_for_it(
    tmp_path: Path, other: subprocess.Popen[bytes]
) -> None:
    """Its number belongs to another process by now, or its cluster and its process are ours."""
    mine, began = _record(this_process(), "second"), started(other.pid)
    assert began is not None
    theirs = _record(Process(socket.gethostname(), other.pid, began), "first")
    registry.write_endpoint(tmp_path, theirs)
    assert registry.stale_owner(tmp_path, mine) == theirs  # one cluster has one endpoint
    elsewhere = mine.model_copy(update={"address": "127.0.0.1:2"})
    with pytest.raises(ConfigError, match="another endpoint that runs"):
        registry.stale_owner(tmp_path, elsewhere)
    for gone in (theirs.model_copy(update={"started": began - 1}), _record(this_process(), "first")):
        registry.write_endpoint(tmp_path, gone)
        assert registry.stale_owner(tmp_path, elsewhere) == gone


@pytest.mark.parametrize("runs", [True, False, None])
def test_an_endpoint_of_another_machine_is_gone_only_where_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: bool | None
) -> None:
    theirs = _record(Process("elsewhere.invalid", 1, 1), "first").model_copy(update={"address": "192.0.2.1:6379"})
    registry.write_endpoint(tmp_path, theirs)
    monkeypatch.setattr(Process, "runs", lambda self, address: runs)
    mine = _record(this_process(), "second")
    if runs is False:
        assert registry.stale_owner(tmp_path, mine) == theirs
        return
    told = (
        r"another endpoint that runs, .*of elsewhere\.invalid\)" if runs
        else r"another endpoint, .*, and 192\.0\.2\.1:6379 does not tell from here whether it runs"
    )  # fmt: skip
    with pytest.raises(ConfigError, match=rf"{told}; stop that one, .* or remove .* where it is gone"):
        registry.stale_owner(tmp_path, mine)
