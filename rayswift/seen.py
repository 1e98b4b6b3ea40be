"""Rows that were looked at, and how they are told: pieces of text with what is trained, media, lengths, embeddings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rayswift.data.formats import RowError
from rayswift.data.media.encoder import num_placeholders
from rayswift.data.types import NUM_PLACEHOLDERS, Example, Features

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rayswift.models.embeddings import EmbeddingStats

_TRAINED, _BAD, _PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[0m"
_BAR = 40
_RUN = re.compile(r"(<[^<>\s]{1,40}>)\1{3,}")


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a row that are all trained on, or all not."""

    text: str
    trained: bool


@dataclass(frozen=True)
class SeenMedium:
    """An image, sound or video: the tokens it fills, and the shapes of what the model reads of it."""

    num_placeholders: int
    features: dict[str, tuple[int, ...]]
    grid: tuple[int, ...] | None
    """Patches in time, height and width, before they are merged into tokens; None for a model that has no grids."""

    def line(self) -> str:
        """One line about it."""
        shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in self.features.items())
        grid = f"grid {'x'.join(map(str, self.grid))}, " if self.grid else ""
        return f"  {self.num_placeholders} placeholders, {grid}{shapes}"


@dataclass(frozen=True)
class SeenRow:
    """A row that was looked at: its pieces and token counts, or the reason why it cannot be used."""

    place: str
    pieces: tuple[Piece, ...] = ()
    num_tokens: int = 0
    num_trained_tokens: int = 0
    bad: str | None = None
    media: tuple[SeenMedium, ...] = ()


@dataclass(frozen=True)
class SeenSource:
    """A source, judged by its first 256 rows. `fill` is the share of packed positions that hold a token."""

    path: str
    format: str
    num_rows: int
    num_looked_at: int
    num_bad: int
    num_unused: int
    mean_tokens: float
    max_tokens: int
    trained_share: float
    fill: float
    lengths: dict[int, int]
    """How many documents are at most so many tokens long, and longer than the entry before."""
    rows: tuple[SeenRow, ...]
    embeddings: tuple[EmbeddingStats, ...] = ()
    """Of text and of each kind of placeholder, as the language model is fed them; of rows with media only."""


@dataclass(frozen=True)
class Preview:
    """What a job trains on."""

    method: str
    max_length: int
    sources: tuple[SeenSource, ...]

    def to_plain(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return asdict(self)

    def text(self, *, colour: bool) -> str:
        """The rows with what is trained on in green, or, without colour, between « and »."""
        return "\n".join(line for source in self.sources for line in _source_lines(source, self.max_length, colour))


def seen_row(place: str, found: list[Example] | RowError, tokenizer: PreTrainedTokenizerBase) -> SeenRow:
    """A row with what it became."""
    if isinstance(found, RowError):
        return SeenRow(place, bad=str(found))
    pieces = [piece for example in found for piece in _pieces(example, tokenizer)]
    media = tuple(_seen_medium(features) for example in found for features in example.media)
    num_tokens = sum(len(example.input_ids) for example in found)
    return SeenRow(place, tuple(pieces), num_tokens, sum(map(num_trained, found)), media=media)


def _seen_medium(features: Features) -> SeenMedium:
    shapes = {name: array.shape for name, array in features.items() if name != NUM_PLACEHOLDERS}
    grid = next((array[0] for name, array in features.items() if name.endswith("grid_thw")), None)
    return SeenMedium(num_placeholders(features), shapes, None if grid is None else tuple(int(n) for n in grid))


def num_trained(example: Example) -> int:
    """Tokens that count for anything, whatever they count."""
    return sum(weight > 0 for weight in example.loss_mask)


def _pieces(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    """The decoded runs of trained and untrained tokens: what the mask says, not what the template meant."""
    pairs = zip(example.input_ids, example.loss_mask, strict=True)
    for trained, run in groupby(pairs, key=lambda pair: bool(pair[1])):
        yield Piece(_shortened(str(tokenizer.decode([token for token, _ in run]))), trained)


def _shortened(text: str) -> str:
    """The text with a run of one special token, as of an image's hundreds of placeholders, told by its number."""
    return _RUN.sub(lambda run: f"{run[1]} x {len(run[0]) // len(run[1])}", text)


def _source_lines(source: SeenSource, max_length: int, colour: bool) -> Iterator[str]:
    unused = f"{source.num_unused} of no use, " if source.num_unused else ""
    yield f"{source.path}: {source.num_rows} rows, format {source.format}"
    yield (
        f"  first {source.num_looked_at}: {source.num_bad} bad, {unused}{source.mean_tokens:.0f} tokens on average, "
        f"{source.max_tokens} at most, {source.trained_share:.0%} trained on; "
        f"sequences of {max_length} are {source.fill:.0%} full"
    )
    yield from _histogram_lines(source.lengths)
    for one in source.embeddings:
        broken = f", {one.num_not_finite} NOT FINITE" if one.num_not_finite else ""
        gap = "" if one.kind == "text" else f", modality gap to text {one.gap:.2f}"
        yield f"  embeddings of {one.kind}: {one.num_tokens}, mean {one.mean:+.4f}, std {one.std:.4f}{gap}{broken}"
    for row in source.rows:
        yield f"-- {row.place}: {row.num_tokens} tokens, {row.num_trained_tokens} trained on"
        yield from (medium.line() for medium in row.media)
        yield (_BAD + str(row.bad) + _PLAIN if colour else f"bad: {row.bad}") if row.bad else _row_text(row, colour)


def _histogram_lines(lengths: dict[int, int]) -> Iterator[str]:
    most = max(lengths.values())
    for longest, count in lengths.items():
        bar = "█" * -(-count * _BAR // most) if count else ""
        yield f"  ≤ {longest:>6} tokens {count:>6} {bar}"


def _row_text(row: SeenRow, colour: bool) -> str:
    before, after = (_TRAINED, _PLAIN) if colour else ("«", "»")
    return "".join(f"{before}{piece.text}{after}" if piece.trained else piece.text for piece in row.pieces)
