"""What became of the answers of one version: counts, and latencies in buckets that can be added up over processes.

Pure values; knows nothing of who counts and who judges.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

EDGES_S = tuple(0.001 * 1.25**power for power in range(64))
"""Upper edges of the latency buckets: 1 ms to 21 minutes, each a quarter wider than the one before."""
_NONE_YET = (0,) * (len(EDGES_S) + 1)


@dataclass(frozen=True)
class Tally:
    """Counts of answers since a start. Invariant: started >= answered + failed + abandoned.

    `first` and `whole` count the seconds to the first token and to the last, by bucket; `waits` those for which answers
    that run have waited for their next token so far, and for which those that were abandoned had. A request that was
    refused as its client's fault is answered; one whose client went away or that was refused for want of a place is
    abandoned; one that the server's own deadline has ended failed, and is one of those that were `late`.
    """

    started: int = 0
    answered: int = 0
    failed: int = 0
    abandoned: int = 0
    first: tuple[int, ...] = _NONE_YET
    whole: tuple[int, ...] = _NONE_YET
    waits: tuple[int, ...] = _NONE_YET
    late: int = 0

    @property
    def ended(self) -> int:
        """Answers that were given or failed."""
        return self.answered + self.failed

    @property
    def running(self) -> int:
        """Answers that have not ended yet."""
        return self.started - self.ended - self.abandoned

    def __add__(self, other: Tally) -> Tally:
        """Both together."""
        return self._with(other, 1)

    def __sub__(self, earlier: Tally) -> Tally:
        """What was counted since an earlier tally of the same."""
        return self._with(earlier, -1)

    def _with(self, other: Tally, sign: int) -> Tally:
        return Tally(
            self.started + sign * other.started,
            self.answered + sign * other.answered,
            self.failed + sign * other.failed,
            self.abandoned + sign * other.abandoned,
            _sum(self.first, other.first, sign),
            _sum(self.whole, other.whole, sign),
            _sum(self.waits, other.waits, sign),
            self.late + sign * other.late,
        )


def _sum(mine: tuple[int, ...], others: tuple[int, ...], sign: int) -> tuple[int, ...]:
    return tuple(a + sign * b for a, b in zip(mine, others, strict=True))


def counted(buckets: tuple[int, ...], seconds: float) -> tuple[int, ...]:
    """The buckets with one more latency in them."""
    place = bisect.bisect_left(EDGES_S, seconds)
    return (*buckets[:place], buckets[place] + 1, *buckets[place + 1 :])


def quantile_s(buckets: tuple[int, ...], fraction: float) -> float | None:
    """The upper edge of the bucket that holds this quantile, in seconds; None where nothing was counted."""
    wanted, seen = fraction * sum(buckets), 0
    for edge, count in zip((*EDGES_S, EDGES_S[-1] * 1.25), buckets, strict=True):
        seen += count
        if count and seen >= wanted:
            return edge
    return None


def longer_than(buckets: tuple[int, ...], seconds: float) -> int:
    """How many are longer than this for certain: those of the next bucket on, so up to a quarter longer."""
    return max(0, sum(buckets[bisect.bisect_left(EDGES_S, seconds) + 1 :]))
