"""Claim: every layout computes the run of one process: losses, gradient norms and weights of four SGD steps in float32
differ by at most 1e-5 from a bare torch loop over unpacked documents.

    python bench/parity.py [--layouts "tp 2" ...] [--keep]        # make parity

One row per layout, method, adapter and way to cut a step, on forked gloo ranks. A row that exceeds a bound without a
reason in tests/parity_rows.py ends this with exit code 1. Rows are random and so is the model: only agreement is
measured. `--keep` writes the table to bench/parity.<date>.txt.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from tests.parity import Difference

WIDTH = 150


@dataclass(frozen=True)
class Row:
    """One line of the table. `found` is None where the row failed or was not run; `why` says the rest."""

    layout: str
    case: str
    found: Difference | None
    seconds: float | None
    why: str
    failed: bool


def rows_of(layout: str) -> list[Row]:
    """The rows of a layout, its ranks forked once where nothing fails."""
    from tests.parity import run_each
    from tests.parity_rows import CASES, LAYOUTS, train_cases, unavailable

    arrangement = LAYOUTS[layout]
    if reason := unavailable(arrangement):
        return [Row(layout, case, None, None, f"not run: {reason}", failed=False) for case in CASES]
    results = run_each(train_cases, arrangement.layout.world_size, layout, list(CASES))
    return [_row(layout, case, result) for case, result in results.items()]


def _row(layout: str, case: str, result: list[Any] | str) -> Row:
    from tests.parity import difference
    from tests.parity_rows import WHY, expected

    if isinstance(result, str):
        return Row(layout, case, None, None, f"crashed: {result.strip().splitlines()[-1]}", failed=True)
    found, why = difference(result, expected(layout, case)), WHY.get((layout, case), "")
    seconds = max(outcome.seconds for outcome in result)
    return Row(
        layout,
        case,
        found,
        seconds,
        why or ("" if found.is_within else "NOT EXPLAINED"),
        not found.is_within and not why,
    )


def table_of(rows: list[Row]) -> Table:
    """The table for a terminal and for the kept file."""
    from rich import box
    from rich.table import Table

    from tests.parity_rows import CASES

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("layout", "method", "adapter", "how", "loss", "grad norm", "eval loss", "weights", "s", "why"):
        table.add_column(
            name,
            no_wrap=name != "why",
            justify="right" if name in ("loss", "grad norm", "eval loss", "weights", "s") else "left",
        )
    for row in rows:
        case, found = CASES[row.case], row.found
        numbers = [f"{x:.1e}" for x in (found.loss, found.norm, found.eval_loss, found.weights)] if found else ["-"] * 4
        seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
        table.add_row(row.layout, case.method, case.adapter, case.details, *numbers, seconds, row.why)
    return table


def main() -> int:
    """Run the rows, show the table, keep it if asked; 1 when a row fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layouts", nargs="*", help="only these")
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the rows are shared with the test suite
    from rich.console import Console

    from tests.evidence import header, kept
    from tests.parity_rows import LAYOUTS

    lines, began, rows = header(), time.perf_counter(), []
    for layout in arguments.layouts or LAYOUTS:
        rows += rows_of(layout)
        done = [row for row in rows if row.layout == layout]
        print(
            f"{time.perf_counter() - began:6.0f} s  {layout}: {sum(row.failed for row in done)} of {len(done)} failed",
            flush=True,
        )
    failed = sum(row.failed for row in rows)
    summary = f"{len(rows)} rows, {failed} failed, {time.perf_counter() - began:.0f} s"
    Console(width=WIDTH).print(table_of(rows), summary)
    if arguments.keep:
        with kept("parity").open("w") as stream:
            stream.write("\n".join(lines) + "\n\n")
            Console(file=stream, width=WIDTH).print(table_of(rows), summary)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
