"""Which rows a run has consumed: the place in the stream where it continues. Pure; kept in every checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

END = -1
"""`Ledger.chunk` once the stream is exhausted: its length depends on `train.epochs`, which a resume may raise."""


@dataclass(frozen=True)
class Ledger:
    """Everything before sequence `sequence` of chunk `chunk` of the stream `fingerprint` has been trained on.

    The counts are sums over all ranks and epochs. `rows_visited` = rows trained on + rows quarantined, up to rows
    that are split over the border of a step: a row counts as trained where its first piece is.
    """

    fingerprint: str
    chunk: int
    sequence: int
    rows_visited: int
    rows_trained: int
    rows_quarantined: int
    tokens: int
    layout: str | None = field(default=None, compare=False, repr=False)
    """The layout of the chunk where a run continues, as JSON (see `chunk_layout`), if its checkpoint has it."""

    @classmethod
    def start(cls, fingerprint: str) -> Ledger:
        """The ledger of a run that has read nothing."""
        return cls(fingerprint, 0, 0, 0, 0, 0, 0)

    def advanced(
        self,
        *,
        position: tuple[int, int] | None,
        rows_visited: int,
        rows_trained: int,
        rows_quarantined: int,
        tokens: int,
    ) -> Ledger:
        """The ledger after one more step, whose counts are given; `position` is None when the stream ended with it."""
        chunk, sequence = (END, 0) if position is None else position
        return Ledger(
            self.fingerprint,
            chunk,
            sequence,
            self.rows_visited + rows_visited,
            self.rows_trained + rows_trained,
            self.rows_quarantined + rows_quarantined,
            self.tokens + tokens,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a manifest, without the layout, which is large and only saves time."""
        return {name: value for name, value in asdict(self).items() if name != "layout"}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Ledger:
        """The ledger that `to_dict` wrote. Raises TypeError for missing or unknown keys."""
        return cls(**plain)
