"""The cells of the support matrix: an architecture under a layout is right, or refused with a reason before it trains.

Knows which layouts are tried and how a cell is judged. The models are in `architecture_cases.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from rayswift import plugins
from rayswift.errors import RaySwiftError
from rayswift.methods.sft import Sft
from rayswift.models.cutting import model_plan
from rayswift.planning.checks import check_layout
from rayswift.planning.layout import Layout, Seat
from rayswift.planning.model_shape import shape_from_config
from rayswift.planning.refused import check_refused
from rayswift.training.self_check import refuse_leaking_packing
from tests.architecture_cases import tiny_architecture, tiny_config
from tests.job_cases import make_job
from tests.parity import LR, Difference, Outcome, Step, difference, run_each, run_engine, run_reference

METHOD = Sft(Sft.Config())


@dataclass(frozen=True)
class Column:
    """What an architecture is tried under."""

    layout: Layout
    engine: str = "fsdp2"
    lora: bool = False
    packing: bool = False

    def job(self) -> Any:
        """The job, under SGD."""
        adapter = {"adapter": {"rank": 4}} if self.lora else {}
        sizes = {f"parallel.{axis}": size for axis, size in asdict(self.layout).items()}
        settings = {"train.optimizer": "sgd", "train.lr": LR, "train.max_grad_norm": 0.5, "data.packing": self.packing}
        return make_job(**settings, **sizes, **adapter)


COLUMNS: dict[str, Column] = {
    "1 process": Column(Layout()),
    "packed": Column(Layout(), packing=True),
    "FSDP2 2": Column(Layout(dp_shard=2)),
    "TP 2": Column(Layout(tp=2)),
    "TP 2, LoRA": Column(Layout(tp=2), lora=True),
    "PP 2": Column(Layout(pp=2), "pipeline"),
    "CP 2": Column(Layout(cp=2)),
    "EP 2": Column(Layout(dp_shard=2, ep=2)),
    "EP 2, LoRA": Column(Layout(dp_shard=2, ep=2), lora=True),
}
STEPS = (Step(packing=False, micro_batches=2), Step(packing=False, micro_batches=1))
PACKED_STEPS = (Step(micro_batches=2), Step(micro_batches=1))


@dataclass(frozen=True)
class Cell:
    """How an architecture does under a column: `right`, `wrong`, `crashed`, `refused` or `none` (nothing to cut).

    `by` says who refused: the planner, or an engine when it was built.
    """

    state: str
    reason: str = ""
    by: str = ""
    worst: Difference | None = None

    @property
    def is_fine(self) -> bool:
        """Whether a user could meet this cell without harm."""
        return self.state in ("right", "refused", "none")


def cells(architecture: str, columns: Mapping[str, Column] = COLUMNS) -> dict[str, Cell]:
    """The cells of an architecture. What the planner lets through is run on forked ranks, once per world size."""
    found = {name: refused(architecture, column) for name, column in columns.items()}
    for size in sorted({column.layout.world_size for column in columns.values()}):
        names = [name for name, column in columns.items() if column.layout.world_size == size and not found[name]]
        if names:
            results = run_each(run_cells, size, architecture, names, timeout_s=300)
            found |= {name: _judged(architecture, columns[name], result) for name, result in results.items()}
    return {name: cell for name in columns if (cell := found[name]) is not None}


def refused(architecture: str, column: Column) -> Cell | None:
    """The cell of what the planner refuses; None where it lets the job through."""
    config = tiny_config(architecture).to_dict()
    shape = shape_from_config(config)
    if column.layout.ep > 1 and shape.num_experts == 1:
        return Cell("none")
    try:
        check_refused(column.job(), config)
        check_layout(column.job(), shape, column.layout, lambda: model_plan(config))
    except RaySwiftError as error:
        return Cell("refused", str(error), "planner")
    return None


def run_cells(rank: int, architecture: str, names: Sequence[str]) -> dict[str, Outcome | str]:
    """Each column's outcome on this rank, or the reason with which the engine refused it."""
    return {name: run_cell(rank, architecture, COLUMNS[name]) for name in names}


def run_cell(rank: int, architecture: str, column: Column) -> Outcome | str:
    """The outcome on this rank, whatever the planner says; or the reason with which the engine refused."""
    model = tiny_architecture(architecture, lora=column.lora)
    engine_class = plugins.load("parallel.engines", column.engine)
    try:
        engine = engine_class(model, column.job(), Seat(column.layout, rank), torch.device("cpu"))
        if column.packing:
            refuse_leaking_packing(engine, column.job())  # as every run does before its first step
        return run_engine(engine, PACKED_STEPS if column.packing else STEPS, METHOD)
    except RaySwiftError as error:
        if dist.is_initialized():
            dist.barrier()  # all ranks refuse, or this one fails here
        return str(error)


def _judged(architecture: str, column: Column, result: list[Any] | str) -> Cell:
    if isinstance(result, str):
        return Cell("crashed", result.strip().splitlines()[-1], "engine")
    if isinstance(result[0], str):
        return Cell("refused", result[0], "engine")
    worst = difference(result, expected(architecture, column.lora))
    return Cell("right" if worst.is_within else "wrong", worst=worst)


@cache
def expected(architecture: str, lora: bool) -> Outcome:
    """What a bare loop gives."""
    model = tiny_architecture(architecture, lora=lora)
    return run_reference(model, Column(Layout()).job(), len(STEPS), METHOD)
