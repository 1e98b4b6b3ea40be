"""Row keys: the place of a row as one int64, which rows a chunk is planned to have, and which ones a block has.

A key is `file << 40 | row`, with the number of the file in the plan. A document that continues a split row carries the
complement `~key`, so that counting the non-negative keys counts each row once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from rayswift.data.mixing import ChunkPart
from rayswift.data.stream import ChunkSpec, StreamPlan

FILE_BITS = 40
ROWS_DTYPE = np.dtype([("chunk", "i4"), ("sequence", "i4"), ("num_sequences", "i4"), ("key", "i8"), ("flags", "u1")])
"""One document or bad row: its place in the stream, its key, and `CUT` and `QUARANTINED`."""
CUT, QUARANTINED = 1, 2


def key_of(file: int, row: int) -> int:
    """The key of a row, counted from 0, of file number `file` of the plan."""
    return file << FILE_BITS | row


def split_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(file, row, whether it continues a split row) of each key."""
    continued = keys < 0
    plain = np.where(continued, ~keys, keys)
    return plain >> FILE_BITS, plain & ((1 << FILE_BITS) - 1), continued


def taken_places(plan: StreamPlan, chunk: ChunkSpec, part: ChunkPart) -> np.ndarray:
    """Which of the `part.size` rows of a part the chunk takes, in order: all, or a seeded `part.num_rows` of them."""
    if part.num_rows == part.size:
        return np.arange(part.size)
    seed = [plan.settings.seed, chunk.epoch, 2, part.file, part.span, part.first]
    return np.sort(np.random.default_rng(seed).permutation(part.size)[: part.num_rows])


def planned_keys(plan: StreamPlan, chunk: ChunkSpec) -> np.ndarray:
    """The keys of all rows that a chunk has by the plan, a repeated row as often as it is repeated."""
    parts = [
        key_of(part.file, plan.files[part.file].spans[part.span].first_row + part.first)
        + taken_places(plan, chunk, part)
        for part in chunk.parts
    ]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def block_rows(block: pa.Table) -> np.ndarray:
    """The documents and bad rows of a block of `prepare.SCHEMA`, as `ROWS_DTYPE`, in the order of its sequences."""
    documents, bad = _lists(block, "rows"), _lists(block, "bad_rows")
    cut = _lists(block, "cut")[1].astype(np.uint8) * CUT
    found = np.empty(len(documents[1]) + len(bad[1]), ROWS_DTYPE)
    places = np.repeat(np.arange(block.num_rows), documents[0]), np.repeat(np.arange(block.num_rows), bad[0])
    order = np.argsort(np.concatenate(places), kind="stable")
    place = np.concatenate(places)[order]
    for name in ("chunk", "sequence", "num_sequences"):
        found[name] = block.column(name).to_numpy()[place]
    found["key"] = np.concatenate([documents[1], bad[1]])[order]
    found["flags"] = np.concatenate([cut, np.full(len(bad[1]), QUARANTINED, np.uint8)])[order]
    return found


def _lists(block: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Length of each list of a column, and all their values."""
    column: Any = block.column(name).combine_chunks()
    lengths = np.diff(column.offsets.to_numpy())
    return lengths, column.flatten().to_numpy(zero_copy_only=False)
