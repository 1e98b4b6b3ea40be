"""`rayswift train` killed with -9: nothing keeps running, and the same command ends with the same losses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.run_cases import committed_step, losses, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.long]

Rayswift = Callable[..., subprocess.CompletedProcess[str]]


def processes_naming(text: str) -> list[int]:
    """Process ids whose command line contains a text."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it has just ended
            if text.encode() in command:
                found.append(int(entry.name))
    return found


def test_the_same_command_continues_a_killed_run(
    rayswift: Rayswift, root: Path, example_model: Path, tmp_path: Path, ray_temp_dir: str
) -> None:
    settings = [
        "train", "examples/sft.yaml", f"model.path={example_model}", f"output={tmp_path}", "train.max_steps=100",
        "train.epochs=100", "train.save_every=5", "cluster.workers=1",
    ]  # fmt: skip
    environment = {**os.environ, "RAYSWIFT_TMPDIR": ray_temp_dir}
    whole = rayswift(*settings, "name=whole", timeout=300, env=environment)
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, "-m", "rayswift.cli", *settings, "name=killed"]
    driver = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: committed_step(tmp_path / "killed") >= 10, "checkpoint")
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    wait_for(lambda: not processes_naming(ray_temp_dir), "end of the processes that the driver started", 60)
    half = tmp_path / "killed/checkpoints/step-00000999"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half a checkpoint")
    again = rayswift(*settings, "name=killed", "--json", timeout=300, env=environment)
    assert again.returncode == 0, again.stderr
    report = json.loads(again.stdout)
    assert report["resumed_from_step"] >= 10
    assert not half.exists()
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole"), "bit for bit on a CPU"
    assert "continuing after step" in again.stderr
    audited = rayswift("data", "audit", str(tmp_path / "killed"), "--json")
    assert audited.returncode == 0, audited.stdout
    total = json.loads(audited.stdout)["total"]
    assert total["read"] == total["trained"] == report["rows_trained"]
