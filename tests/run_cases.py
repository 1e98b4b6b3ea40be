"""What the suites look at in a run directory, and how they wait for it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def losses(run_dir: str | Path) -> list[float]:
    """The training losses of a run, in step order; fails unless each step is recorded once."""
    records = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == list(range(1, len(steps) + 1)), "each step is recorded once"
    return [record["loss"] for record in records if "loss" in record]


def committed_step(run_dir: Path) -> int:
    """The newest step a manifest vouches for, 0 for none: old ones are removed, so no single one can be waited for."""
    return max((int(path.parent.name[5:]) for path in run_dir.glob("checkpoints/step-*/manifest.json")), default=0)


def wait_for(condition: Callable[[], T], what: str, timeout_s: float = 180) -> T:
    """The condition's first true value. Fails after the bound."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"no {what} within {timeout_s} s"
        time.sleep(0.05)
    return value
