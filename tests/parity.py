"""The same training run on an engine and as a bare torch loop, and how far the two are apart.

Knows what is measured and the bounds; which layouts and models are measured is in `parity_rows.py` and
`architecture_cases.py`. SGD, because AdamW turns the rounding of a gradient near zero into a step of full size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayswift.config.job import Job
from tests.engine_cases import DOCS_PER_STEP, Document, Reference, documents, share
from tests.ranks.forked import RankFailed, run_ranks

LR = 0.1
BOUND = 1e-5  # of losses and weights absolute, of gradient norms relative and absolute together
_EVAL_SEED = 99


@dataclass(frozen=True)
class Step:
    """How the documents of a step reach the model."""

    packing: bool = True
    micro_batches: int = 1


@dataclass(frozen=True)
class Outcome:
    """What one side saw: (loss, gradient norm) of each step, the loss of an evaluation behind the last one, and the
    trained weights by name."""

    steps: list[tuple[float, float]]
    eval_loss: float
    weights: dict[str, np.ndarray]
    seconds: float = 0.0


@dataclass(frozen=True)
class Difference:
    """The largest differences over all steps and ranks; `norm_share` is in units of the bound of that norm."""

    loss: float
    norm: float
    norm_share: float
    eval_loss: float
    weights: float

    @property
    def is_within(self) -> bool:
        """Whether every difference is within its bound. What is no number is not."""
        return max(self.loss, self.eval_loss, self.weights) <= BOUND and self.norm_share <= 1


def rows_of(step: int, method: Any) -> list[Document]:
    """The documents of a step, the same ones for every layout; a method on plain text trains all of their tokens."""
    rows = documents(DOCS_PER_STEP, seed=step)
    everything = method.rendering == "text"
    return [Document(row.ids, np.ones_like(row.mask)) for row in rows] if everything else rows


def run_engine(engine: Any, steps: Sequence[Step], method: Any) -> Outcome:
    """The run on this rank."""
    began, found = time.perf_counter(), []
    for number, step in enumerate(steps):
        batches = _share(engine, number, step, method)
        stats = engine.optimizer_step(engine.forward_backward(batches, method, _count(engine, batches, method)), LR)
        assert stats.grad_norm is not None
        found.append((stats.loss, stats.grad_norm))
    (batch,) = _share(engine, _EVAL_SEED, Step(packing=steps[-1].packing), method)
    loss = engine.sum_over_data([float(method.loss(engine.forward(batch), batch))])[0]
    weights = {name: tensor.numpy() for name, tensor in engine.export_weights()}
    return Outcome(found, loss / _count(engine, [batch], method), weights, time.perf_counter() - began)


def run_reference(model: Any, job: Job, num_steps: int, method: Any) -> Outcome:
    """The run as a bare loop over unpacked documents."""
    reference = Reference(model, job)
    steps = [reference.step(rows_of(number, method)) for number in range(num_steps)]
    eval_loss = reference.evaluate(rows_of(_EVAL_SEED, method))
    return Outcome(steps, eval_loss, {name: tensor.numpy() for name, tensor in reference.weights().items()})


def difference(ranks: Sequence[Outcome], wanted: Outcome) -> Difference:
    """How far the ranks are from `wanted`. Together they must have its weights; of a pipeline a rank has some."""
    missing = wanted.weights.keys() - {name for outcome in ranks for name in outcome.weights}
    assert not missing, f"no rank has {sorted(missing)[0]}"
    losses, norms, shares = [], [], []
    for outcome in ranks:
        for (loss, norm), (wanted_loss, wanted_norm) in zip(outcome.steps, wanted.steps, strict=True):
            losses.append(abs(loss - wanted_loss))
            norms.append(abs(norm - wanted_norm))
            shares.append(norms[-1] / (BOUND * (1 + wanted_norm)))
    weights = [
        float(np.abs(outcome.weights[name] - wanted.weights[name]).max())
        for outcome in ranks
        for name in wanted.weights.keys() & outcome.weights.keys()
    ]
    evals = [abs(outcome.eval_loss - wanted.eval_loss) for outcome in ranks]
    return Difference(*(float(np.max(part)) for part in (losses, norms, shares, evals, weights)))


def run_each(
    function: Callable[..., dict[str, Any]], world_size: int, what: Any, names: Sequence[str], *, timeout_s: float = 600
) -> dict[str, list[Any] | str]:
    """name -> each rank's result of `function(rank, what, names)`, forked once for all names where nothing fails.

    Where something does, every name gets ranks of its own, and the text of the failure stands for its results.
    """
    try:
        ranks = run_ranks(function, world_size, what, list(names), timeout_s=timeout_s)
    except RankFailed as error:
        if len(names) == 1:
            return {names[0]: str(error)}
        alone = (run_each(function, world_size, what, [name], timeout_s=timeout_s) for name in names)
        return {name: result for found in alone for name, result in found.items()}
    return {name: [rank[name] for rank in ranks] for name in names}


def _share(engine: Any, number: int, step: Step, method: Any) -> list[Any]:
    return share(
        rows_of(number, method), packing=step.packing, micro_batches=step.micro_batches,
        data_rank=engine.data_rank, data_size=engine.data_size,
    )  # fmt: skip


def _count(engine: Any, batches: Sequence[Any], method: Any) -> float:
    return float(engine.sum_over_data([sum(float(method.count(batch)) for batch in batches)])[0])
