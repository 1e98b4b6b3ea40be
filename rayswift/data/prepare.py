"""One chunk of the stream as an Arrow table of sequences: read, shuffle, normalise, tokenize, pack.

A pure function of plan, chunk number and tokenizer; runs in Ray Data tasks, in tests and in evaluation alike.
What the keys of rows mean is known by `row_keys`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import save

from rayswift.data.chunk_layout import ChunkLayout, numbered
from rayswift.data.detect import normalise
from rayswift.data.formats import RowError, UnusedRow
from rayswift.data.mixing import ChunkPart
from rayswift.data.packing import pack
from rayswift.data.row_keys import key_of, taken_places
from rayswift.data.sources import RawRow, bad_row, read_rows
from rayswift.data.stream import ChunkSpec, StreamPlan
from rayswift.data.tokenize import encode
from rayswift.data.types import BadRow, Encoded, Example, Sample
from rayswift.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rayswift.data.media.encoder import MediaEncoder

SCHEMA = pa.schema(
    [
        ("chunk", pa.int32()),
        ("sequence", pa.int32()),
        ("num_sequences", pa.int32()),
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.float32())),
        ("lengths", pa.list_(pa.int32())),
        ("rows", pa.list_(pa.int64())),
        ("cut", pa.list_(pa.bool_())),
        ("visited", pa.int32()),
        ("bad", pa.list_(pa.string())),
        ("bad_rows", pa.list_(pa.int64())),
        ("media", pa.list_(pa.binary())),
        ("rope", pa.list_(pa.int32())),
        ("layout", pa.string()),
    ]
)
"""One row per sequence. `lengths`, `rows` and `cut` (was truncated) have an entry per document; `num_sequences` is the
chunk's, so that the place after its last sequence is known to be the next chunk. `visited` shares the chunk's rows, bad
ones included, among its sequences; `bad` holds the chunk's BadRows as JSON and `bad_rows` their keys, on its first.
`media` has the features of each medium as safetensors, `rope` the rope positions [A, T] of a model with several axes,
row by row, else null. `layout` is the chunk's, on its first sequence, else null."""


@dataclass(frozen=True)
class _Row:
    """A row of the chunk with its place."""

    file: int
    raw: RawRow

    @property
    def key(self) -> int:
        return key_of(self.file, self.raw[0])


def prepare_chunk(
    plan: StreamPlan, index: int, tokenizer: PreTrainedTokenizerBase, media: MediaEncoder | None = None
) -> pa.Table:
    """The sequences of chunk `index`, as `SCHEMA` says. `media` is needed where the rows of the plan have any.

    A chunk without a usable row gives one empty sequence, which carries its bad rows to the quarantine.
    """
    chunk = plan.chunk(index)
    rows = _rows(plan, chunk)
    documents, bad = _documents(plan, rows, tokenizer, media)
    bins = _bins(plan, chunk, [len(example.input_ids) for _, example in documents]) or [[]]
    names = list(numbered(key for key, _ in documents))
    layout = ChunkLayout.of(index, ([names[i] for i in one] for one in bins))
    return _table(layout, 0, len(rows), [[documents[i] for i in one] for one in bins], bad)


def prepare_part(
    plan: StreamPlan,
    layout: ChunkLayout,
    part: range,
    tokenizer: PreTrainedTokenizerBase,
    media: MediaEncoder | None = None,
) -> pa.Table:
    """Only the sequences `part` of a chunk whose layout is known; no other row is tokenized.

    Raises DataError where the rows do not give the documents that they gave when the layout was made.
    """
    wanted = layout.sequences[part.start : part.stop]
    needed = {key for one in wanted for key, _ in one}
    rows = _rows(plan, plan.chunk(layout.chunk))
    documents, _ = _documents(
        plan, list({row.key: row for row in rows if row.key in needed}.values()), tokenizer, media
    )
    found = dict(zip(numbered(key for key, _ in documents), documents, strict=True))
    try:
        return _table(layout, part.start, len(rows), [[found[name] for name in one] for one in wanted], [])
    except KeyError as error:
        raise DataError(
            "gives other documents than when the checkpoint was made: the tokenizer or media have changed since",
            path="row",
            value=error.args[0][0],
        ) from error


def _rows(plan: StreamPlan, chunk: ChunkSpec) -> list[_Row]:
    rows = [_Row(part.file, raw) for part in chunk.parts for raw in _part_rows(plan, chunk, part)]
    if plan.settings.shuffle:
        order = np.random.default_rng([plan.settings.seed, chunk.epoch, 1, chunk.number]).permutation(len(rows))
        rows = [rows[i] for i in order]
    return rows


def _part_rows(plan: StreamPlan, chunk: ChunkSpec, part: ChunkPart) -> Iterator[RawRow]:
    file = plan.files[part.file]
    rows = islice(read_rows(file, file.spans[part.span]), part.first, part.first + part.size)
    if part.num_rows == part.size:
        return rows
    taken = set(taken_places(plan, chunk, part).tolist())
    return (row for place, row in enumerate(rows) if place in taken)


def _documents(
    plan: StreamPlan, rows: Sequence[_Row], tokenizer: PreTrainedTokenizerBase, media: MediaEncoder | None
) -> tuple[list[tuple[int, Example]], list[tuple[int, BadRow]]]:
    """(key, Example) of all documents in row order, and (key, reason) of the rows that gave none."""
    read = [_read(plan, row, media) for row in rows]
    outcomes = [one if isinstance(one, BadRow) else one[0] for one in read]
    settings = plan.settings
    encoded = iter(
        encode(
            [sample for sample in outcomes if isinstance(sample, Sample)],
            tokenizer,
            max_length=settings.max_length,
            rendering=settings.rendering,
            truncation=settings.truncation,
            loss=settings.loss,
            media=media,
            encoded=[one[1] for one in read if not isinstance(one, BadRow)],
        )
    )
    documents: list[tuple[int, Example]] = []
    bad: list[tuple[int, BadRow]] = []
    for row, outcome in zip(rows, outcomes, strict=True):
        found = outcome if isinstance(outcome, BadRow) else next(encoded)
        if isinstance(found, list):
            documents += [(~row.key if piece else row.key, example) for piece, example in enumerate(found)]
        else:
            bad.append((row.key, found if isinstance(found, BadRow) else _bad(plan, row, found)))
    return documents, bad


def _read(plan: StreamPlan, row: _Row, media: MediaEncoder | None) -> tuple[Sample, tuple[Encoded, ...]] | BadRow:
    """The row as a Sample with its media encoded, or why there is none."""
    value = row.raw[2]
    if isinstance(value, BadRow):
        return value
    file = plan.files[row.file]
    try:
        sample = normalise(value, plan.formats[file.source], plan.sources[file.source])
        for medium in sample.media:
            if medium.kind not in plan.settings.media_kinds:
                raise RowError(f"has {medium.kind}, which no row had that was looked at: name it in data.media.kinds")
        if sample.media and media is None:
            raise RowError("has media, and the model takes only text")
        return sample, media.encode(sample, file.path) if media is not None else ()
    except RowError as error:
        return _bad(plan, row, error)


def _bad(plan: StreamPlan, row: _Row, error: RowError) -> BadRow:
    number, line, value = row.raw
    bad = bad_row(plan.files[row.file], number, line, str(error), str(value))
    return replace(bad, counts=not isinstance(error, UnusedRow))


def _bins(plan: StreamPlan, chunk: ChunkSpec, lengths: list[int]) -> list[list[int]]:
    """Which documents share a sequence. Packing sorts by length, so the sequences are put into a seeded order."""
    if not plan.settings.packing:
        return [[i] for i in range(len(lengths))]
    bins = [sorted(one) for one in pack(lengths, plan.settings.max_length)]
    if not plan.settings.shuffle:
        return sorted(bins)
    order = np.random.default_rng([plan.settings.seed, chunk.epoch, 3, chunk.number]).permutation(len(bins))
    return [bins[i] for i in order]


def _table(
    layout: ChunkLayout,
    first: int,
    num_rows: int,
    sequences: list[list[tuple[int, Example]]],
    bad: list[tuple[int, BadRow]],
) -> pa.Table:
    """Sequences of a chunk of `num_rows` rows from its sequence `first` on."""
    count, total = len(sequences), len(layout.sequences)
    nothing: list[list[Any]] = [[]] * (count - 1)
    columns = {
        "chunk": [layout.chunk] * count,
        "sequence": list(range(first, first + count)),
        "num_sequences": [total] * count,
        "input_ids": [_concatenated([example.input_ids for _, example in one], np.int32) for one in sequences],
        "loss_mask": [_concatenated([example.loss_mask for _, example in one], np.float32) for one in sequences],
        "lengths": [[len(example.input_ids) for _, example in one] for one in sequences],
        "rows": [[key for key, _ in one] for one in sequences],
        "cut": [[example.cut for _, example in one] for one in sequences],
        "visited": [num_rows * (i + 1) // total - num_rows * i // total for i in range(first, first + count)],
        "bad": [[row.to_json() for _, row in bad], *nothing],
        "bad_rows": [[key for key, _ in bad], *nothing],
        "media": [[save(features) for _, example in one for features in example.media] for one in sequences],
        "rope": [_rope([example for _, example in one]) for one in sequences],
        "layout": [None if i else layout.to_json() for i in range(first, first + count)],
    }
    return pa.table(columns, schema=SCHEMA)


def _rope(examples: Sequence[Example]) -> np.ndarray | None:
    parts = [example.rope_AT for example in examples if example.rope_AT is not None]
    return np.concatenate(parts, axis=1).astype(np.int32).reshape(-1) if parts else None


def _concatenated(parts: list[list[Any]], dtype: type) -> np.ndarray:
    """Numpy rows, which Arrow takes many times faster than lists; by way of array, which takes a list whole."""
    joined = array(np.dtype(dtype).char)
    for part in parts:
        joined.fromlist(part)
    return np.frombuffer(joined, dtype)
