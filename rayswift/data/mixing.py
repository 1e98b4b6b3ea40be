"""How many rows of each source an epoch has, and which: pure arithmetic on the pieces that files are cut into."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Stopping = Literal["weights", "first_exhausted", "all_exhausted"]


@dataclass(frozen=True)
class ChunkPart:
    """Some rows of a span: rows `first` to `first + size` of it, of which a seeded `num_rows` are taken."""

    file: int
    span: int
    first: int
    size: int
    num_rows: int


def quotas(num_rows: Sequence[int], weights: Sequence[float], stopping: Stopping) -> list[int]:
    """Rows that an epoch visits of each source, which has `num_rows` rows and a weight.

    Under `weights` a source is visited `weight` times. Otherwise the quotas are to one another as the weights are, cut
    down to whole rows: `first_exhausted` scales them so that one source is visited exactly once and none more often,
    `all_exhausted` so that one is visited exactly once and none less often. That is what `interleave_datasets` of
    Hugging Face's datasets comes to, where weights are its `probabilities`; here the counts are exact, not drawn.
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]  # 0.7 is seven tenths, not the binary next to it
    lengths = [n / weight for n, weight in zip(num_rows, exact, strict=True) if n]
    if stopping == "weights" or not lengths:
        return [n * int(w) + _upto(w - int(w))(n) for n, w in zip(num_rows, weights, strict=True)]
    length = min(lengths) if stopping == "first_exhausted" else max(lengths)
    return [int(weight * length) if n else 0 for n, weight in zip(num_rows, exact, strict=True)]


def weighted(pieces: list[ChunkPart], weight: float) -> Iterator[ChunkPart]:
    """Every piece `int(weight)` times, and once more with the fraction of its rows."""
    return _repeated(pieces, int(weight), _upto(weight - int(weight)))


def exactly(pieces: list[ChunkPart], num_rows: int) -> Iterator[ChunkPart]:
    """The pieces as often as they fit into `num_rows` rows, and once more with what is left spread over them."""
    size = sum(piece.size for piece in pieces) or 1
    copies, left = divmod(num_rows, size)
    return _repeated(pieces, copies, lambda rows: rows * left // size)


def _upto(fraction: float) -> Callable[[int], int]:
    return lambda rows: int(rows * fraction + 1e-9)


def _repeated(pieces: list[ChunkPart], copies: int, upto: Callable[[int], int]) -> Iterator[ChunkPart]:
    """Every piece `copies` times, and once more with those of its rows that `upto` counts among the first so many.

    Counting along the source, an epoch has the same number of rows whatever the order.
    """
    for _ in range(copies):
        yield from pieces
    before = 0
    for piece in pieces:
        after = before + piece.size
        num_rows = upto(after) - upto(before)
        if num_rows:
            yield ChunkPart(piece.file, piece.span, piece.first, piece.size, num_rows)
        before = after


def blended(sources: Sequence[Sequence[ChunkPart]]) -> tuple[ChunkPart, ...]:
    """The parts of all sources, each source spread evenly over the whole: so they stay if nothing shuffles them."""
    placed = []
    for number, parts in enumerate(sources):
        total, before = sum(part.num_rows for part in parts), 0
        for part in parts:
            placed.append(((before + part.num_rows / 2) / total, number, part))
            before += part.num_rows
    return tuple(part for _, _, part in sorted(placed, key=lambda one: one[:2]))
