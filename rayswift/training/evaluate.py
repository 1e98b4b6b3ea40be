"""The held-out loss: the same method over the held-out rows, without gradients.

`LossSum` is what a mean loss is made of wherever one is measured: in a run, by `rayswift eval`, of an export.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rayswift.data.types import BadRow, PackedBatch, StepInput
from rayswift.errors import DataError
from rayswift.methods import Loss, Method
from rayswift.parallel.engine import Engine

if TYPE_CHECKING:
    import torch


@dataclass
class LossSum:
    """A method's loss over all batches added, in nats, and what their tokens count together: their number, unless rows
    weigh messages."""

    loss_sum: float = 0.0
    count: float = 0.0

    def add(self, method: Loss, logprobs_BT: torch.Tensor, batch: PackedBatch) -> None:
        """Add a batch by the log-probabilities of its targets."""
        self.loss_sum += float(method.loss(logprobs_BT.to(batch.weights_BT.device), batch))
        self.count += float(method.count(batch))

    @property
    def mean(self) -> float:
        """The loss of a token that counts 1. Raises ZeroDivisionError where nothing counts."""
        return self.loss_sum / self.count


class Evaluator:
    """Measures the mean held-out loss. Rows are prepared at the first evaluation and kept for the next ones."""

    def __init__(self, engine: Engine, method: Method, read: Callable[[], Iterable[StepInput]]) -> None:
        """`read` gives this rank's shares once, the same number on every rank."""
        self._engine, self._method, self._read = engine, method, read
        self._shares: list[StepInput] | None = None

    def read(self) -> tuple[BadRow, ...] | None:
        """Prepare this rank's rows; the bad ones among them the first time, None when that was done before."""
        if self._shares is not None:
            return None
        self._shares = list(self._read())
        return tuple(row for share in self._shares for row in share.bad_rows)

    def loss(self) -> float:
        """The loss summed over all held-out rows and ranks, divided by their global count; called by all ranks.

        Raises DataError when nothing is left to measure: a loss of 0 would look like success.
        """
        self.read()
        assert self._shares is not None, "read keeps the shares"
        own = LossSum()
        for share in self._shares:
            for batch in share.micro_batches:
                own.add(self._method, self._engine.forward(batch), batch)
        total = LossSum(*self._engine.sum_over_data([own.loss_sum, own.count]))
        if not total.count:
            raise DataError("data.eval has no row that can be used; repair the rows, or leave data.eval out")
        return total.mean
