"""Claim: after its first step a quickstart run waits at most 1% of its step time for data.

    rayswift quickstart text --output quickstart
    python bench/data_wait.py quickstart/runs/pretrain quickstart/runs/sft

Reads metrics.jsonl of finished runs: `data_wait_s` is the part of `step_time_s` before the step's rows were there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> int:
    """Print a line for each run; 1 when the claim is missed."""
    if not sys.argv[1:]:
        sys.exit("name run directories, such as quickstart/runs/sft")
    worst = 0.0
    for run in sys.argv[1:]:
        records = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        first, *steps = [record for record in records if "loss" in record]
        waited, taken = (sum(step[key] for step in steps) for key in ("data_wait_s", "step_time_s"))
        worst = max(worst, waited / taken)
        print(
            f"{Path(run).name}: {len(steps) + 1} steps; first waited {first['data_wait_s'] * 1e3:.1f} ms, the others "
            f"{waited:.3f} of {taken:.1f} s = {waited / taken:.2%} (claim <= 1%)"
        )
    return 0 if worst <= 0.01 else 1


if __name__ == "__main__":
    sys.exit(main())
