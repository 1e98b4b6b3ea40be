"""Claim: an architecture under a layout computes what one process does, to 1e-5 as in bench/parity.py, or is refused
with a reason before it trains. Never anything else.

    python bench/architectures.py [--only gemma2 ...] [--keep]        # make parity

A tiny random model of each architecture, built from its config; which ones, and under what, is in
tests/architecture_cases.py and tests/architecture_cells.py. `--keep` writes bench/architectures.<date>.txt, and
bench/architectures.json, from which README's table is rendered. A cell that is wrong or crashes is exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from tests.architecture_cells import Cell

ROOT = Path(__file__).resolve().parents[1]
KEPT, README = ROOT / "bench" / "architectures.json", ROOT / "README.md"
BEGIN, END = "<!-- architectures -->", "<!-- /architectures -->"
WIDTH = 200
Cells = Mapping[str, Mapping[str, Any]]
"""Column -> what is known of its cell: `state`, `reason`, `by`, `worst`."""


def reason_of(cell: Mapping[str, Any]) -> str:
    """The reason alone, without the setting, the model's name and what to do instead."""
    return re.sub(r"^.*has no way to [^:]+: ", "", cell["reason"]).split("; ")[0]


INTRO = """\
Measured with tiny random models of each architecture, cut in two (`bench/architectures.py`): `yes` computes the losses,
gradient norms and weights of one process within 1e-5, trained in full or, where it says LoRA, with an adapter on every
linear layer; `no` is refused before a run starts, for the reason below; `-` has no experts. For an architecture that is
not here, the engines check the same before their first step, as far as it can be seen."""


def render(architectures: Mapping[str, Cells]) -> str:
    """What README says: architectures that do alike in one row, and the reasons below it by number."""
    columns = [name for name in next(iter(architectures.values())) if name != "1 process"]
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, cells in sorted(architectures.items()):
        rows.setdefault(tuple(_outcome(cells[column]) for column in columns), []).append(name)
    lines = [INTRO, "", f"| architectures | {' | '.join(columns)} |", f"|---{'|---' * len(columns)}|"]
    numbers = {"yes": "yes", "-": "-"}
    for outcomes, names in sorted(rows.items(), key=lambda row: -len(row[1])):
        symbols = [numbers.setdefault(outcome, f"no ({len(numbers) - 1})") for outcome in outcomes]
        lines.append(f"| {', '.join(names)} | {' | '.join(symbols)} |")
    return "\n".join([*lines, "", *(f"{symbol[4:-1]}. {reason}" for reason, symbol in list(numbers.items())[2:])])


def _outcome(cell: Mapping[str, Any]) -> str:
    """`yes`, `-`, or why not."""
    if cell["state"] == "refused":
        return reason_of(cell)
    return {"right": "yes", "none": "-"}.get(cell["state"], f"{cell['state'].upper()}: {cell['reason']}")


def plain_of(cell: Cell) -> dict[str, Any]:
    """What is kept of a cell."""
    worst = cell.worst and {name: float(f"{figure:.1e}") for name, figure in asdict(cell.worst).items()}
    return {"state": cell.state, "reason": cell.reason, "by": cell.by, "worst": worst}


def table_of(architectures: Mapping[str, Cells]) -> Table:
    """The table for a terminal and for the kept file: the largest difference of a loss and of a gradient norm."""
    from rich import box
    from rich.table import Table

    table = Table("architecture", *next(iter(architectures.values())), box=box.SIMPLE_HEAD, pad_edge=False)
    for name, cells in architectures.items():
        table.add_row(name, *map(_figures, cells.values()))
    return table


def _figures(cell: Mapping[str, Any]) -> str:
    worst = cell["worst"]
    figures = f"{worst['loss']:.0e} {worst['norm']:.0e}" if worst else ""
    return figures if cell["state"] == "right" else f"{cell['state']} {figures}".strip()


def details_of(architectures: Mapping[str, Cells]) -> Iterable[str]:
    """A line for each cell that is not right: who refused it, and the whole text."""
    for name, cells in architectures.items():
        for column, cell in cells.items():
            if cell["state"] not in ("right", "none"):
                yield f"{name}, {column}: {cell['state']} by the {cell['by'] or 'comparison'}: {cell['reason']}"


def keep(lines: list[str], architectures: Mapping[str, Cells], summary: str) -> None:
    """Write the dated text, the JSON, and README's table."""
    from rich.console import Console

    from tests.evidence import kept

    with kept("architectures").open("w") as stream:
        stream.write("\n".join(lines) + "\n\n")
        Console(file=stream, width=WIDTH).print(table_of(architectures), summary)
        stream.write("\n" + "\n".join(details_of(architectures)) + "\n")
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(cells)}" for name, cells in architectures.items())
    KEPT.write_text(f'{{"of": {json.dumps(lines)},\n"architectures": {{\n{rows}\n}}}}\n')
    write_readme(architectures)


def write_readme(architectures: Mapping[str, Cells]) -> None:
    """Put the table where README's markers are."""
    text = README.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{render(architectures)}\n{END}{after}")


def main() -> int:
    """Compute the cells, show the table, keep it if asked; 1 when a cell is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="only these architectures")
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", TRANSFORMERS_VERBOSITY="error")
    sys.path.insert(0, str(ROOT))  # the models are shared with the test suite
    from rich.console import Console

    from tests.architecture_cases import ARCHITECTURES
    from tests.architecture_cells import cells
    from tests.evidence import header

    lines, began, found = header(), time.perf_counter(), {}
    for name in arguments.only or ARCHITECTURES:
        found[name] = {column: plain_of(cell) for column, cell in cells(name).items()}
        states = ", ".join(f"{column} {cell['state']}" for column, cell in found[name].items())
        print(f"{time.perf_counter() - began:6.0f} s  {name}: {states}", flush=True)
    every = [cell for cells_ in found.values() for cell in cells_.values()]
    wrong = sum(cell["state"] in ("wrong", "crashed") for cell in every)
    right = sum(cell["state"] == "right" for cell in every)
    refused = sum(cell["state"] == "refused" for cell in every)
    summary = (
        f"{len(found)} architectures, {right} cells right, {refused} refused, {wrong} wrong; loss and gradient norm; "
        f"{time.perf_counter() - began:.0f} s"
    )
    Console(width=WIDTH).print(table_of(found), summary)
    print("\n".join(details_of(found)))
    if arguments.keep:
        keep(lines, found, summary)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
