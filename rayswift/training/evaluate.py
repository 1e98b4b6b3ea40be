"""The held-out loss: the same method over the held-out rows, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rayswift.data.types import StepInput
from rayswift.methods import Method
from rayswift.parallel.engine import Engine


class Evaluator:
    """Measures the mean held-out loss. Rows are prepared at the first evaluation and kept for the next ones."""

    def __init__(self, engine: Engine, method: Method, read: Callable[[], Iterable[StepInput]]) -> None:
        """`read` gives this rank's shares once, the same number on every rank."""
        self._engine, self._method, self._read = engine, method, read
        self._shares: list[StepInput] | None = None

    def loss(self) -> float:
        """The loss summed over all held-out rows and ranks, divided by their global count; called by all ranks."""
        if self._shares is None:
            self._shares = list(self._read())
        loss_sum, count = 0.0, 0.0
        for share in self._shares:
            for batch in share.micro_batches:
                logprobs_BT = self._engine.forward(batch).to(batch.weights_BT.device)
                loss_sum += float(self._method.loss(logprobs_BT, batch))
                count += float(self._method.count(batch))
        totals = self._engine.sum_over_data([loss_sum, count])
        return totals[0] / max(totals[1], 1e-12)
