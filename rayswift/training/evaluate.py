"""The held-out loss: the same method over the held-out rows, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rayswift.data.types import BadRow, StepInput
from rayswift.errors import DataError
from rayswift.methods import Method
from rayswift.parallel.engine import Engine


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
        loss_sum, count = 0.0, 0.0
        for share in self._shares:
            for batch in share.micro_batches:
                logprobs_BT = self._engine.forward(batch).to(batch.weights_BT.device)
                loss_sum += float(self._method.loss(logprobs_BT, batch))
                count += float(self._method.count(batch))
        loss_sum, count = self._engine.sum_over_data([loss_sum, count])
        if not count:
            raise DataError("data.eval has no row that can be used; repair the rows, or leave data.eval out")
        return loss_sum / count
