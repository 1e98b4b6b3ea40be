"""How far a run has come, and how far it goes."""

from __future__ import annotations

from dataclasses import dataclass

from rayswift.config.job import TrainSpec
from rayswift.data.ledger import Ledger


@dataclass(frozen=True)
class TrainState:
    """Optimizer steps done and the rows they consumed. Equal on every rank."""

    step: int
    ledger: Ledger
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class Horizon:
    """Where the run ends: after `max_steps`, or when the stream of `rows_total` rows does."""

    train: TrainSpec
    rows_total: int

    def reached(self, state: TrainState) -> bool:
        """Whether no further step is due, as far as steps tell; the end of the rows is found by reading."""
        return self.train.max_steps is not None and state.step >= self.train.max_steps

    def ended(self, state: TrainState) -> bool:
        """Whether the step that led here was the last: no further one is due, or every row was visited."""
        return self.reached(state) or state.ledger.rows_visited >= self.rows_total

    def progress(self, state: TrainState) -> float:
        """The fraction of the run that lies behind, 0 to 1: of its steps when they are bounded, else of its rows."""
        if self.train.max_steps is not None:
            return min(1.0, state.step / self.train.max_steps)
        return min(1.0, state.ledger.rows_visited / max(1, self.rows_total))

    def epoch(self, state: TrainState) -> float:
        """Epochs done, fractional."""
        return self.train.epochs * state.ledger.rows_visited / max(1, self.rows_total)
