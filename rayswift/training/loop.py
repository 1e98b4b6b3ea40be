"""The one loop: no branch on a method's, an engine's or a layout's name.

Knows the order of a step. Files, Ray, metrics and checkpoints live behind `hooks`; sharding and accumulation
behind the engine; rows behind the source.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from rayswift.data.types import BadRow, StepInput
from rayswift.errors import WorkerError
from rayswift.methods import Method
from rayswift.parallel.engine import Engine, StepStats
from rayswift.training.schedule import learning_rate
from rayswift.training.state import Horizon, TrainState

MAX_SKIPPED_STEPS = 20


@dataclass(frozen=True)
class StepRecord:
    """What a finished step reports to the hooks; figures are over all ranks, times are this rank's, in seconds."""

    stats: StepStats
    lr: float
    tokens: int
    rows: int
    sequences: int
    step_time_s: float
    data_wait_s: float
    bad_rows: tuple[BadRow, ...]
    num_bad_rows: int
    row_keys: np.ndarray | None = None
    """This rank's rows of the step; see `StepInput.rows`."""
    layout: tuple[int, str] | None = None
    """See `StepInput.layout`."""


class Hooks(Protocol):
    """What happens around steps, called on every rank in the same order."""

    def after_step(self, state: TrainState, record: StepRecord) -> None:
        """A step was taken: record it, evaluate, save."""
        ...


def train(
    engine: Engine, method: Method, steps: Iterator[StepInput], state: TrainState, horizon: Horizon, hooks: Hooks
) -> TrainState:
    """The state after the last step. `steps` continues where `state.ledger` stands.

    The loss of a step is its sum over all ranks divided by its global count, so that it does not depend on
    micro-batches, accumulation, packing or the number of ranks. Raises WorkerError after 20 steps in a row
    whose gradients are not finite.
    """
    while not horizon.reached(state):
        began = time.perf_counter()
        share = next(steps)
        waited = time.perf_counter() - began
        totals = _sum_shares(engine, method, share)
        if totals.sequences == 0:
            break
        _seed_step(horizon.train.seed, state.step, engine.data_rank)
        stats = engine.forward_backward(share.micro_batches, method, totals.count)
        lr = learning_rate(horizon.train, state.step + 1, horizon.progress(state))
        stats = engine.optimizer_step(stats, lr)
        state = _advance(state, stats, totals)
        hooks.after_step(state, _record(stats, lr, totals, share, time.perf_counter() - began, waited))
    return state


@dataclass(frozen=True)
class _Totals:
    """One step's sums over data ranks. `chunk`, `sequence`: the stream position after it, 0 when it ended."""

    count: float
    sequences: float
    tokens: float
    rows: float
    visited: float
    bad: float
    chunk: float
    sequence: float
    positioned: float


def _sum_shares(engine: Engine, method: Method, share: StepInput) -> _Totals:
    """Shares are contiguous in rank order, so the last rank alone knows where the stream stands after the step."""
    last = engine.data_rank == engine.data_size - 1
    position = share.position if last else None
    return _Totals(
        *engine.sum_over_data(
            [
                sum(float(method.count(batch)) for batch in share.micro_batches),
                share.num_sequences,
                share.num_tokens,
                share.num_rows,
                share.num_rows_visited,
                len(share.bad_rows),
                position[0] if position else 0,
                position[1] if position else 0,
                1 if position else 0,
            ]
        )
    )


def _advance(state: TrainState, stats: StepStats, totals: _Totals) -> TrainState:
    position = (int(totals.chunk), int(totals.sequence)) if totals.positioned else None
    ledger = state.ledger.advanced(
        position=position,
        rows_visited=int(totals.visited),
        rows_trained=int(totals.rows),
        rows_quarantined=int(totals.bad),
        tokens=int(totals.tokens),
    )
    skipped = state.skipped_in_a_row + 1 if stats.skipped else 0
    if skipped >= MAX_SKIPPED_STEPS:
        raise WorkerError(
            f"gradients were not finite in {skipped} steps in a row, up to step {state.step + 1}; "
            "lower train.lr, set train.max_grad_norm, or use model.dtype=float32"
        )
    return replace(state, step=state.step + 1, ledger=ledger, skipped_in_a_row=skipped)


def _record(
    stats: StepStats, lr: float, totals: _Totals, share: StepInput, elapsed: float, waited: float
) -> StepRecord:
    return StepRecord(
        stats=stats,
        lr=lr,
        tokens=int(totals.tokens),
        rows=int(totals.rows),
        sequences=int(totals.sequences),
        step_time_s=elapsed,
        data_wait_s=waited,
        bad_rows=share.bad_rows,
        num_bad_rows=int(totals.bad),
        row_keys=share.rows,
        layout=share.layout,
    )


def _seed_step(seed: int, step: int, data_rank: int) -> None:
    """Randomness (dropout) is a function of seed, step and rank: nothing to save, and a resumed run repeats it."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + data_rank) % 2**63)
