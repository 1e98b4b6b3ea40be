"""A run directory has one writer, and a dead writer holds nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rayswift.errors import CheckpointError
from rayswift.training.lock import sole_writer
from rayswift.training.run_dir import RunDir

_HOLD = """
import sys
from rayswift.training.lock import sole_writer
from rayswift.training.run_dir import RunDir
with sole_writer(RunDir(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_session_is_told_who_holds_the_run_and_gets_it_when_that_one_dies(tmp_path: Path, root: Path) -> None:
    run_dir = RunDir(str(tmp_path / "run"))
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, run_dir.url], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(CheckpointError, match=rf"run is being trained by another session \(process {holder.pid} on"),
            sole_writer(run_dir, wait_s=0),
        ):
            pass
        holder.kill()
        with sole_writer(run_dir):
            assert f"process {holder.pid} " not in (tmp_path / "run" / ".lock").read_text()
    with sole_writer(run_dir, wait_s=0):
        pass


def test_an_object_store_has_no_lock() -> None:
    run_dir = RunDir("memory://runs/unlocked")
    with sole_writer(run_dir), sole_writer(run_dir, wait_s=0):
        assert not run_dir.exists(".lock")
