"""The stream of chunks: a pure function of file indexes, seed and settings. Reads no rows, loads no tokenizer.

An epoch is a seeded permutation of spans, cut into chunks of about `chunk_rows` rows. The chunks of all epochs
are numbered through, so a place in training is a chunk and a sequence, and a resume reads nothing before it.
How many rows an epoch has of each source is said by `mixing`.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np

from rayswift.config.job import DataSource, DataSpec, MediaSpec
from rayswift.data.ledger import END, Ledger
from rayswift.data.loss_rule import LossRule, rule_of
from rayswift.data.mixing import ChunkPart, Stopping, blended, exactly, quotas, weighted
from rayswift.data.rendering import Rendering
from rayswift.data.sources import FileIndex
from rayswift.data.tokenize import Truncation
from rayswift.data.types import MediaKind

CHUNK_BYTES = 32 << 20
"""A chunk is cut before it holds more bytes than this, however few rows that is."""
MEDIA_CHUNK_ROWS = 64
"""The most rows of a chunk whose rows have images, audio or video."""
FIRST_CHUNK_ROWS = 256
"""The first chunk of a long run is small, so that the first step does not wait for thousands of rows."""


@dataclass(frozen=True)
class StreamSettings:
    """What decides the content of the stream, beside files and sources. Epochs only decide its length."""

    seed: int
    max_length: int
    packing: bool
    truncation: Truncation | None
    shuffle: bool
    chunk_rows: int
    rendering: Rendering
    loss: LossRule
    stopping: Stopping = "weights"
    media: MediaSpec = field(default_factory=MediaSpec)
    media_kinds: tuple[MediaKind, ...] = ()
    """The kinds of media that rows may have: each micro-batch has some of each."""


@dataclass(frozen=True)
class ChunkSpec:
    """Which rows are prepared together. `number` counts the chunks of the epoch."""

    index: int
    epoch: int
    number: int
    parts: tuple[ChunkPart, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the chunk, a row that is repeated counted as often, bad rows included."""
        return sum(part.num_rows for part in self.parts)


@dataclass(frozen=True)
class StreamPlan:
    """Everything that is trained on, in order. Small enough to travel to every worker; see `plan_stream`."""

    files: tuple[FileIndex, ...]
    sources: tuple[DataSource, ...]
    formats: tuple[str, ...]
    settings: StreamSettings
    epochs: int
    cache: str | None = None
    """Where prepared chunks are kept between runs; decides nothing of their content."""

    @property
    def num_chunks(self) -> int:
        """Chunks of all epochs."""
        return self._epoch_starts[-1]

    @property
    def num_rows_total(self) -> int:
        """Rows of all epochs, as visited."""
        return self.rows_per_epoch * self.epochs

    @cached_property
    def rows_per_epoch(self) -> int:
        """Rows visited in an epoch, weights applied; the same in every epoch."""
        return sum(part.num_rows for part in self._parts)

    @cached_property
    def rows_at_stake(self) -> int:
        """The rows that bad ones are a part of: an epoch's, or, where weights below 1 have each epoch read others, all
        that its epochs can reach together."""
        visits: Counter[tuple[int, int]] = Counter()
        for part in self._parts:
            visits[part.file, part.span] += part.num_rows
        reached = (
            min(count * self.epochs, self.files[file].spans[span].num_rows) for (file, span), count in visits.items()
        )
        return max(self.rows_per_epoch, sum(reached))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the files' hashes and of all settings that decide which sequences come in which order."""
        plain = {
            "files": [[file.source, file.reader, file.sha256, file.num_rows] for file in self.files],
            "sources": [source.model_dump(mode="json", exclude={"path"}) for source in self.sources],
            "formats": self.formats,
            "settings": asdict(self.settings),
        }
        return hashlib.sha256(json.dumps(plain, sort_keys=True, default=_plain).encode()).hexdigest()

    def chunk(self, index: int) -> ChunkSpec:
        """Chunk `index` of the stream. Raises IndexError outside 0 to `num_chunks - 1`."""
        if not 0 <= index < self.num_chunks:
            raise IndexError(f"chunk {index} of {self.num_chunks}")
        epoch = bisect_right(self._epoch_starts, index) - 1
        number = index - self._epoch_starts[epoch]
        order, cuts = self._epoch(epoch)
        parts = tuple(self._parts[i] for i in order[cuts[number] : cuts[number + 1]])
        return ChunkSpec(index, epoch, number, parts)

    def position(self, ledger: Ledger) -> tuple[int, int]:
        """(chunk, sequences to drop of it) where a ledger continues; `(num_chunks, 0)` when nothing is left.

        A stream that had ended continues with the epochs it did not have then.
        """
        if ledger.chunk != END:
            return ledger.chunk, ledger.sequence
        done = ledger.rows_visited // max(1, self.rows_per_epoch)
        return (self._epoch_starts[min(done, self.epochs)]), 0

    def __getstate__(self) -> dict[str, Any]:
        """The fields only: what is derived from them is cheap to derive again, and larger to send."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @cached_property
    def _parts(self) -> tuple[ChunkPart, ...]:
        if self.settings.stopping == "weights":
            return tuple(
                part
                for number, source in enumerate(self.sources)
                for part in weighted(list(self._pieces(number)), source.weight)
            )
        pieces = [list(self._pieces(number)) for number in range(len(self.sources))]
        sizes = [sum(piece.size for piece in own) for own in pieces]
        wanted = quotas(sizes, [source.weight for source in self.sources], self.settings.stopping)
        return blended([list(exactly(own, quota)) for own, quota in zip(pieces, wanted, strict=True)])

    def _pieces(self, source: int) -> Iterator[ChunkPart]:
        """The spans of a source; one that is longer than a chunk is visited in several parts."""
        step = self.settings.chunk_rows
        for number, file in enumerate(self.files):
            if file.source == source:
                for index, span in enumerate(file.spans):
                    for first in range(0, span.num_rows, step):
                        size = min(step, span.num_rows - first)
                        yield ChunkPart(number, index, first, size, size)

    @cached_property
    def _epoch_starts(self) -> list[int]:
        """The first chunk of each epoch, and behind them the number of all chunks."""
        starts = [0]
        for epoch in range(self.epochs):
            starts.append(starts[-1] + len(self._epoch(epoch)[1]) - 1)
        return starts

    def _epoch(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """The parts in the epoch's order, and where its chunks begin in it, closed by its end; kept per epoch."""
        kept = self._epochs
        if epoch not in kept:
            order = np.arange(len(self._parts))
            if self.settings.shuffle:
                order = np.random.default_rng([self.settings.seed, epoch, 0]).permutation(order)
            costs = self._costs[order]
            first = min(1.0, FIRST_CHUNK_ROWS / self.settings.chunk_rows) if epoch == 0 else 1.0
            kept[epoch] = order, _cuts(costs, first)
        return kept[epoch]

    @cached_property
    def _epochs(self) -> dict[int, tuple[np.ndarray, list[int]]]:
        return {}

    @cached_property
    def _costs(self) -> np.ndarray:
        """How much of a chunk each part fills: by its rows, or by its bytes where rows are large."""
        costs = np.empty(len(self._parts))
        for i, part in enumerate(self._parts):
            span = self.files[part.file].spans[part.span]
            share = part.num_rows / max(1, span.num_rows)
            costs[i] = max(part.num_rows / self.settings.chunk_rows, share * span.num_bytes / CHUNK_BYTES)
        return costs


def plan_stream(
    files: Sequence[FileIndex],
    sources: Sequence[DataSource],
    formats: Sequence[str],
    *,
    data: DataSpec,
    rendering: Rendering,
    epochs: int,
    seed: int,
    media_kinds: Sequence[MediaKind] = (),
) -> StreamPlan:
    """The stream over the indexed files of `sources`, whose rows have the given `formats` (see `inspect.preflight`).

    A chunk of rows with media is smaller: it is held in memory with all its pictures.

    Raises ConfigError for a `data.loss` that means nothing here.
    """
    settings = StreamSettings(
        seed=seed,
        max_length=data.max_length,
        packing=data.packing,
        truncation=data.truncation,
        shuffle=data.shuffle,
        chunk_rows=min(data.chunk_rows, MEDIA_CHUNK_ROWS) if media_kinds else data.chunk_rows,
        rendering=rendering,
        loss=rule_of(data, everything=rendering == "text"),
        stopping=data.mixing.stopping,
        media=data.media,
        media_kinds=tuple(media_kinds),
    )
    return StreamPlan(tuple(files), tuple(sources), tuple(formats), settings, epochs, data.cache)


def _plain(spec: MediaSpec) -> dict[str, Any]:
    """What of a MediaSpec decides the content of the stream: not where a machine keeps its files."""
    return spec.model_dump(mode="json", exclude={"folder", "kinds"})


def _cuts(costs: np.ndarray, first: float) -> list[int]:
    """Borders `[0, ..., len(costs)]` of chunks of even cost up to about 1; the first of several costs only `first`."""
    ends = np.cumsum(costs)
    if not len(costs):
        return [0]
    head = int(np.searchsorted(ends, first - 1e-9)) + 1 if first < 1 and ends[-1] > 1 else 0
    rest, offset = costs[head:], (ends[head - 1] if head else 0.0)
    cuts = {0, head, len(costs)}
    if len(rest):
        total = float(rest.sum())
        num_chunks = int(np.ceil(total - 1e-9)) or 1
        middles = ends[head:] - offset - rest / 2
        chunk_of = np.minimum(middles * num_chunks / total, num_chunks - 1).astype(int)
        cuts |= {head + int(i) + 1 for i in np.flatnonzero(np.diff(chunk_of))}
    return sorted(cuts)
