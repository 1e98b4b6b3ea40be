"""The run directory: files replaced as a whole, logs that survive a cut-off line, on disk and in a bucket."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from rayswift.errors import CheckpointError, ConfigError
from rayswift.training import run_dir as module
from rayswift.training.run_dir import JsonlLog, RunDir


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunDir:
    """A run directory on a local disk, and one on a file system that cannot append."""
    return RunDir(str(tmp_path / "runs" / "a") if request.param == "disk" else f"memory://{tmp_path.name}/a")


def test_text_is_written_read_and_removed(folder: RunDir) -> None:
    folder.write_text("job.yaml", "name: ä\n")
    folder.write_text("deep/er/x.txt", "1")
    assert folder.read_text("job.yaml") == "name: ä\n"
    assert folder.exists("deep/er/x.txt")
    folder.remove("deep")
    folder.remove("deep")  # a second time is no error
    assert not folder.exists("deep")
    with pytest.raises(FileNotFoundError):
        folder.read_text("deep/er/x.txt")


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunDir(str(tmp_path))
    folder.write_text("a.json", "old")

    def power_cut(fd: int) -> None:
        raise OSError("power cut")  # without a number: nothing says that it would last

    monkeypatch.setattr(module.os, "fsync", power_cut)
    with pytest.raises(OSError, match="power cut"):
        folder.write_text("a.json", "new and longer")
    assert folder.read_text("a.json") == "old"


def test_flushed_to_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(module.os, "fsync", lambda fd: (calls.append("fsync"), real_sync(fd))[1])
    monkeypatch.setattr(module.os, "replace", lambda a, b: (calls.append("replace"), real_replace(a, b))[1])
    RunDir(str(tmp_path)).write_text("a.json", "x")
    assert calls == ["fsync", "replace", "fsync"], "the content, its name, and the folder that holds the name"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_is_told_as_such_and_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunDir(str(tmp_path))
    log = JsonlLog(folder, "metrics.jsonl", up_to_step=0)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "fsync", full)
    for write in (lambda: folder.write_text("a.json", "x"), log.flush):
        with pytest.raises(CheckpointError, match=r"run=.* cannot be written: No space left on device; free some"):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    monkeypatch.undo()
    log.close()


def test_an_unknown_protocol_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"^output=nope://x/y cannot be opened"):
        RunDir("nope://x/y")


def test_local_is_told_from_remote(tmp_path: Path) -> None:
    assert RunDir(str(tmp_path)).is_local
    assert RunDir(f"file://{tmp_path}").is_local
    assert not RunDir("memory://x").is_local
    assert RunDir(f"{tmp_path}/").url == str(tmp_path)


def test_jsonl_leaves_out_a_last_line_cut_off_by_a_crash(folder: RunDir) -> None:
    folder.write_text("m.jsonl", '{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert folder.read_jsonl("m.jsonl") == [{"step": 1}, {"step": 2}]
    assert folder.read_jsonl("absent.jsonl") == []


def test_a_line_without_its_newline_is_cut_off_too(folder: RunDir) -> None:
    folder.write_text("m.jsonl", '{"step": 1}\n{"step": 2}')
    assert folder.read_jsonl("m.jsonl") == [{"step": 1}]


def test_a_log_continues_after_the_step_it_resumes_from(folder: RunDir) -> None:
    log = JsonlLog(folder, "m.jsonl", up_to_step=0)
    for step in range(1, 6):
        log.append({"step": step, "text": "ä"})
    log.close()
    folder.write_text("m.jsonl", folder.read_text("m.jsonl") + '{"step": 6, "cut')
    again = JsonlLog(folder, "m.jsonl", up_to_step=3)
    again.append({"step": 4, "second": True})
    again.close()
    records = folder.read_jsonl("m.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[-1] == {"step": 4, "second": True}


def test_local_lines_are_visible_at_once(tmp_path: Path) -> None:
    log = JsonlLog(RunDir(str(tmp_path)), "m.jsonl", up_to_step=0)
    log.append({"step": 1})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1}
    log.close()


def test_remote_lines_are_visible_after_a_flush() -> None:
    folder = RunDir("memory://flush/a")
    log = JsonlLog(folder, "m.jsonl", up_to_step=0)
    log.append({"step": 1})
    assert folder.read_jsonl("m.jsonl") == []
    log.flush()
    assert folder.read_jsonl("m.jsonl") == [{"step": 1}]
    log.close()
