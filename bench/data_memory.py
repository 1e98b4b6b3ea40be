"""Claim: the memory of the driver and of a training worker does not grow with the data set: at most 5% more for 10
times the rows after the same number of steps.

    python bench/data_memory.py [--rows 12000] [--steps 120]

`rayswift train` with one worker on a small random model, once with so many rows of GSM8K and once with ten times as
many. Both processes are asked for their resident memory four times a second; what counts is its mean over the last half
of the steps. The driver is the process of the command, the worker the one that writes the metrics.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.data_rows import gsm8k_rows, small_model


def make_job(folder: Path, name: str, steps: int) -> Path:
    """A run of `steps` steps over `name`.jsonl that saves now and then, as runs do."""
    job: dict[str, Any] = {
        "name": name, "output": str(folder / "runs"), "method": {"name": "sft"},
        "model": {"path": str(folder / "model")},
        "data": {"train": [{"path": str(folder / f"{name}.jsonl")}], "max_length": 512},
        "train": {"max_steps": steps, "epochs": 100, "global_batch_size": 8, "micro_batch_size": 2, "save_every": 20},
        "cluster": {"workers": 1, "device": "cpu"}, "logging": {"tensorboard": False},
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(job))
    return path


def steps_done(run: Path) -> int:
    """Steps in metrics.jsonl."""
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b'"loss"') if metrics.exists() else 0


def worker_of(run: Path) -> psutil.Process | None:
    """The process that trains, by its own word."""
    events = run / "events.jsonl"
    starts = [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []
    return next((psutil.Process(one["pid"]) for one in starts if one["event"] == "start"), None)


def measured(folder: Path, name: str, steps: int) -> dict[str, float]:
    """Mean resident memory in MiB of driver and worker over the last half of the steps."""
    run = folder / "runs" / name
    process = subprocess.Popen(
        [sys.executable, "-m", "rayswift.cli", "train", str(make_job(folder, name, steps))],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    driver, seen = psutil.Process(process.pid), {"driver": [0.0], "worker": [0.0]}
    while process.poll() is None:
        try:
            if steps_done(run) > steps // 2 and (worker := worker_of(run)) is not None:
                seen["worker"].append(worker.memory_info().rss / 2**20)
                seen["driver"].append(driver.memory_info().rss / 2**20)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.25)
    _, told = process.communicate()
    if process.returncode:
        sys.exit(told[-3000:])
    return {who: mean(values[1:]) for who, values in seen.items()}


def main() -> int:
    """Print both runs; 1 when the claim is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=12_000)
    parser.add_argument("--steps", type=int, default=120)
    arguments = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}", flush=True)
    found = []
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        small_model(folder / "model")
        for label, rows in (("few", arguments.rows), ("many", 10 * arguments.rows)):
            gsm8k_rows(folder / f"{label}.jsonl", rows)
            found.append(measured(folder, label, arguments.steps))
            shown = ", ".join(f"{who} {value:.0f} MiB" for who, value in found[-1].items())
            print(f"{rows} rows: {shown}", flush=True)
    ratios = {who: found[1][who] / found[0][who] for who in ("driver", "worker")}
    print(
        ", ".join(f"{who} {ratio:.3f}" for who, ratio in ratios.items()) + " of its memory with a tenth (claim <= 1.05)"
    )
    return 0 if max(ratios.values()) <= 1.05 else 1


if __name__ == "__main__":
    sys.exit(main())
