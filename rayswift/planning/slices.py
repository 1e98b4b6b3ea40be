"""Slices: the part of a model that one worker computes, cut by pipeline, tensor and expert parallelism.

Data sharding is not counted here: it stores a slice in pieces, but each worker computes with the whole of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from rayswift.planning.layout import Layout
from rayswift.planning.model_shape import ModelShape
from rayswift.planning.stages import STAGES_PER_RANK, num_stages, stage_layers, stage_owner


@dataclass(frozen=True)
class Slice:
    """One worker's part. `dense` holds `dense_blocks`, embeddings and head; experts are counted beside it.

    `share_of_blocks` is the fraction of all layers, `in_flight` how many micro-batches wait for their backward pass.
    """

    dense: int
    dense_blocks: int
    experts: int
    num_layers: int
    share_of_blocks: float
    has_head: bool
    in_flight: float


def pipeline_bubble(layout: Layout, schedule: str, micro_batches: int) -> float:
    """The share of a step that a worker of a pipeline waits; 0 without one.

    (p - 1) / (m + p - 1) of 1F1B, with half the wait where workers have two stages (arXiv 2104.04473). The schedules
    without bubble fill more of it with gradients of weights: for them it is an upper bound.
    """
    waiting = layout.pp - 1
    return waiting / (STAGES_PER_RANK[schedule] * micro_batches + waiting)


def all_slices(shape: ModelShape, layout: Layout, schedule: str, micro_batches: int) -> tuple[Slice, ...]:
    """The slice of each pipeline rank; blocks are taken as equal."""
    stages = num_stages(schedule, layout.pp) if layout.pp > 1 else 1
    counts = [len(blocks) for blocks in stage_layers(max(shape.num_layers, stages), stages)]
    owners = [stage_owner(schedule, layout.pp, stage) if layout.pp > 1 else 0 for stage in range(stages)]
    layers = [sum(n for n, owner in zip(counts, owners, strict=True) if owner == rank) for rank in range(layout.pp)]
    return tuple(
        _slice(
            shape, layout, layers[rank], rank == owners[-1], rank, _in_flight(layout.pp, rank, schedule, micro_batches)
        )
        for rank in range(layout.pp)
    )


def _slice(shape: ModelShape, layout: Layout, layers: int, has_head: bool, rank: int, in_flight: float) -> Slice:
    tables = 1 if shape.tied else 2
    table = min(shape.vocab_size * shape.hidden_size, shape.num_params // 2 // tables)
    blocks = shape.num_params - tables * table
    experts = min(shape.expert_params, blocks)
    dense_blocks = (blocks - experts) * layers // shape.num_layers // layout.tp
    return Slice(
        dense=dense_blocks + _tables(table, layout.tp, shape.tied, has_embedding=rank == 0, has_head=has_head),
        dense_blocks=dense_blocks,
        experts=experts * layers // shape.num_layers // (layout.ep if layout.ep > 1 else layout.tp),
        num_layers=layers,
        share_of_blocks=layers / shape.num_layers,
        has_head=has_head,
        in_flight=in_flight,
    )


def _tables(table: int, tp: int, tied: bool, *, has_embedding: bool, has_head: bool) -> int:
    """Parameters of embedding and head here. A head is cut by its vocabulary, an embedding only if it is that head."""
    if tied:
        return table // tp if has_embedding or has_head else 0
    return table * has_embedding + table // tp * has_head


def _in_flight(pp: int, rank: int, schedule: str, micro_batches: int) -> float:
    """Micro-batches whose activations a rank holds at once, counted over all of its layers."""
    if schedule in ("1f1b", "zbv"):  # a V ends where it begins: every rank holds as many as the first
        return min(pp - rank if schedule == "1f1b" else pp, micro_batches)
    chunks = 3 * pp - 1 - 2 * rank if pp > 1 else 1  # of half a rank's layers each
    return min(chunks, 2 * micro_batches) / 2 if pp > 1 else 1.0
