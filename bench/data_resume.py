"""Claim: a run that continues at 90% of an epoch has the batch of its first step at most 1.3 times as late as a fresh
run has, wherever in a chunk it stands, and tokenizes no row that it has trained on.

    python bench/data_resume.py [--rows 120000] [--places 9]

What is timed is what a training worker does from the start of its stream to its first batch, once modules are imported
and the plan is there, which take both the same time: the tokenizer is loaded, the head start is prepared and collated,
and a resume reads the layout of its chunk from its checkpoint. Fresh and resumed starts take turns in one process.
For comparison the same places without the layout, which is what a checkpoint of an older version has.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.data_rows import gsm8k_rows, plan_of_rows, small_model

GLOBAL_BATCH = 16


def first_batch(folder: Path, plan: Any, place: str) -> dict[str, Any]:
    """Seconds until the first batch is there from `chunk,sequence,layout file`, and how many rows were tokenized."""
    from rayswift.data import prepare
    from rayswift.data.blocks import head_start, step_inputs
    from rayswift.data.ledger import Ledger
    from rayswift.models.loading import load_tokenizer

    chunk, sequence, layout = place.split(",")
    counts, documents = [], prepare._documents
    prepare._documents = lambda p, rows, *rest: counts.append(len(rows)) or documents(p, rows, *rest)
    began = time.perf_counter()
    ledger = replace(
        Ledger.start(plan.fingerprint), chunk=int(chunk), sequence=int(sequence),
        layout=Path(layout).read_text() if layout else None,
    )  # fmt: skip
    blocks, _ = head_start(
        plan, load_tokenizer(str(folder / "model")), data_rank=0, data_size=1, global_batch_size=GLOBAL_BATCH,
        ledger=ledger,
    )  # fmt: skip
    assert blocks, "a whole step is left in the chunk"
    next(step_inputs(blocks, sequences_per_step=GLOBAL_BATCH, micro_batch_size=4, pad_id=0))
    prepare._documents = documents
    return {"s": time.perf_counter() - began, "rows": sum(counts)}


def layouts(folder: Path, plan: Any, places: int) -> list[tuple[str, str]]:
    """`places` places around 90% of the epoch as (with, without) the layout of their chunks, which are written down."""
    from rayswift.data.prepare import prepare_chunk
    from rayswift.models.loading import load_tokenizer

    tokenizer, found = load_tokenizer(str(folder / "model")), []
    for number in range(places):
        chunk = int(plan.num_chunks * 0.9) + number % 3
        table = prepare_chunk(plan, chunk, tokenizer)
        sequence = (number + 1) * (table.num_rows - GLOBAL_BATCH) // (places + 1)
        file = folder / f"layout{number}.json"
        file.write_text(table.column("layout")[0].as_py())
        found.append((f"{chunk},{sequence},{file}", f"{chunk},{sequence},"))
    return found


def main() -> int:
    """Print a line for each place; 1 when the claim is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=120_000)
    parser.add_argument("--places", type=int, default=9)
    arguments = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}", flush=True)
    ratios, before = [], []
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        gsm8k_rows(folder / "rows.jsonl", arguments.rows)
        small_model(folder / "model")
        plan = plan_of_rows(folder / "rows.jsonl")
        for place, without in layouts(folder, plan, arguments.places):
            fresh, resumed, bare = (first_batch(folder, plan, one) for one in ("0,0,", place, without))
            ratios.append(resumed["s"] / fresh["s"])
            before.append(bare["s"] / fresh["s"])
            print(
                f"chunk,sequence {without[:-1]}: fresh {fresh['s']:.3f} s ({fresh['rows']} rows tokenized), "
                f"resumed {resumed['s']:.3f} s ({resumed['rows']} rows), ratio {ratios[-1]:.2f}; "
                f"without the layout {bare['s']:.3f} s ({bare['rows']} rows), ratio {before[-1]:.2f}",
                flush=True,
            )
    print(f"median ratio {median(ratios):.2f}, worst {max(ratios):.2f} (claim <= 1.3); "
          f"without the layout {median(before):.2f}")  # fmt: skip
    return 0 if median(ratios) <= 1.3 else 1


if __name__ == "__main__":
    sys.exit(main())
