"""`rayswift train` killed with -9: nothing keeps running, and the same command ends with the same losses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.ray]

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


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {timeout_s} s"
        time.sleep(0.05)


def losses(run_dir: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = [(record["step"], record["loss"]) for record in records if "loss" in record]
    assert len(found) == len(dict(found)), "each step is recorded once"
    return dict(found)


def test_the_same_command_continues_a_killed_run(
    rayswift: Rayswift, root: Path, example_model: Path, tmp_path: Path, ray_temp_dir: str
) -> None:
    settings = [
        "train", "examples/sft.yaml", f"model.path={example_model}", f"output={tmp_path}", "train.max_steps=60",
        "train.epochs=100", "train.save_every=5", "cluster.workers=1",
    ]  # fmt: skip
    environment = {**os.environ, "RAYSWIFT_TMPDIR": ray_temp_dir}
    whole = rayswift(*settings, "name=whole", timeout=300, env=environment)
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, "-m", "rayswift.cli", *settings, "name=killed"]
    driver = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "killed/checkpoints/step-00000010/manifest.json").exists(), "checkpoint")
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    wait_for(lambda: not processes_naming(ray_temp_dir), "end of the processes that the driver started", 60)
    half = tmp_path / "killed/checkpoints/step-00000055"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half a checkpoint")
    again = rayswift(*settings, "name=killed", "--json", timeout=300, env=environment)
    assert again.returncode == 0, again.stderr
    report = json.loads(again.stdout)
    assert report["resumed_from_step"] >= 10
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole"), "bit for bit on a CPU"
    assert "continuing after step" in again.stderr
