"""Claim: the record of rows costs a step less than 1 ms and a row less than 5 bytes.

    python bench/row_record.py [--rows 60000]

GSM8K packed into 1,024 tokens, 16 sequences a step. `block_rows` is what a rank does for each step (in the thread that
reads ahead), a file is what rank 0 does at each checkpoint. Gathering and flushing to the disk come on top.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.data_rows import gsm8k_rows, plan_of_rows, small_model

STEPS = 500


def main() -> int:
    """Print the figures; 1 when the claim is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=60_000)
    arguments = parser.parse_args()
    from rayswift.data.blocks import local_blocks
    from rayswift.data.ledger import Ledger
    from rayswift.data.row_keys import block_rows
    from rayswift.models.loading import load_tokenizer
    from rayswift.training.row_record import RecordFile, in_order, to_bytes

    print(f"{platform.machine()}, Python {platform.python_version()}", flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        gsm8k_rows(folder / "rows.jsonl", arguments.rows)
        small_model(folder / "model")
        plan = plan_of_rows(folder / "rows.jsonl")
        tokenizer = load_tokenizer(str(folder / "model"))
        stream = local_blocks(
            plan, tokenizer, data_rank=0, data_size=1, global_batch_size=16, ledger=Ledger.start(plan.fingerprint)
        )
        blocks = [next(stream) for _ in range(STEPS)]
    began = time.perf_counter()
    rows = [block_rows(block) for block in blocks]
    each_us = (time.perf_counter() - began) / STEPS * 1e6
    print(f"block_rows: {each_us:.0f} us a step")
    worst = 0.0
    for every in (50, STEPS):
        began = time.perf_counter()
        files = [
            to_bytes(RecordFile(in_order([list(enumerate(rows[start : start + every], start + 1))]), "", None))
            for start in range(0, STEPS, every)
        ]
        step_us = (time.perf_counter() - began) / STEPS * 1e6
        per_row = sum(map(len, files)) / sum(map(len, rows))
        worst = max(worst, per_row)
        print(f"a file every {every} steps: {per_row:.1f} bytes a row, {step_us:.0f} us a step")
        total_us = each_us + step_us
    return 0 if total_us < 1000 and worst < 5 else 1


if __name__ == "__main__":
    sys.exit(main())
