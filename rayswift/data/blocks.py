"""Blocks of sequences: the rows of a step that one data rank trains on, and how they become its StepInput.

No Ray here. `local_blocks` gives a rank, in its own process, the very blocks that `pipeline` gives it through Ray.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from safetensors.numpy import load

from rayswift.data.chunks import chunk_from, chunks_left
from rayswift.data.collate import Filler, PackedSequence, collate
from rayswift.data.ledger import Ledger
from rayswift.data.row_keys import block_rows
from rayswift.data.stream import StreamPlan
from rayswift.data.types import BadRow, Features, PackedBatch, StepInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rayswift.data.media.encoder import MediaEncoder


def step_inputs(
    blocks: Iterable[pa.Table],
    *,
    sequences_per_step: int,
    micro_batch_size: int,
    pad_id: int,
    filler: Filler | None = None,
) -> Iterator[StepInput]:
    """One StepInput per block, then empty ones without end, because other ranks may still have rows.

    A block is this rank's whole share of a step: `sequences_per_step` sequences, fewer only at the end of the
    stream. Every StepInput has the same number of micro-batches, the missing ones filled with padding.
    """
    num_micro_batches = -(-sequences_per_step // micro_batch_size)
    padding = collate([], pad_id, filler=filler)
    for block in blocks:
        if block.num_rows:
            assert block.num_rows <= sequences_per_step, "a block is one rank's share of a step"
            batches = list(_micro_batches(block, micro_batch_size, pad_id, filler))
            batches += [padding] * (num_micro_batches - len(batches))
            yield _step_input(block, tuple(batches), full=block.num_rows == sequences_per_step)
    while True:
        yield StepInput((padding,) * num_micro_batches, 0, 0, 0, 0, None)


def local_blocks(
    plan: StreamPlan,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data_rank: int,
    data_size: int,
    global_batch_size: int,
    ledger: Ledger,
    media: MediaEncoder | None = None,
) -> Iterator[pa.Table]:
    """The blocks of one data rank from where `ledger` stands: block k of the stream goes to rank k % data_size."""
    tables = (chunk_from(plan, index, tokenizer, ledger, media) for index in chunks_left(plan, ledger))
    for number, block in enumerate(_rebatched(tables, global_batch_size // data_size)):
        if number % data_size == data_rank:
            yield block


def head_start(
    plan: StreamPlan,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data_rank: int,
    data_size: int,
    global_batch_size: int,
    ledger: Ledger,
    media: MediaEncoder | None = None,
) -> tuple[list[pa.Table], Ledger]:
    """This rank's blocks of the whole steps in the first chunk left, and the ledger after them.

    A rank can prepare these few rows itself while Ray Data's processes start, and read the rest of the stream from
    the returned ledger. Only its position is moved; the counts are the loop's business.
    """
    left = chunks_left(plan, ledger)
    if not left:
        return [], ledger
    table = chunk_from(plan, left.start, tokenizer, ledger, media, least=global_batch_size)
    whole = table.num_rows // global_batch_size * global_batch_size
    share = global_batch_size // data_size
    blocks = [table.slice(start + data_rank * share, share) for start in range(0, whole, global_batch_size)]
    if not blocks:
        return [], ledger
    chunk, sequence = _position_after(table.slice(0, whole))
    layout = table.column("layout")[0].as_py() or ledger.layout
    return blocks, replace(ledger, chunk=chunk, sequence=sequence, layout=layout)


def _rebatched(tables: Iterable[pa.Table], num_rows: int) -> Iterator[pa.Table]:
    """The same rows in blocks of exactly `num_rows`; only the last may be smaller."""
    left: list[pa.Table] = []
    held = 0
    for table in tables:
        left.append(table)
        held += table.num_rows
        if held < num_rows:
            continue
        whole = pa.concat_tables(left)
        for start in range(0, held - held % num_rows, num_rows):
            yield whole.slice(start, num_rows)
        left, held = [whole.slice(held - held % num_rows)], held % num_rows
    if held:
        yield pa.concat_tables(left)


def _micro_batches(block: pa.Table, micro_batch_size: int, pad_id: int, filler: Filler | None) -> Iterator[PackedBatch]:
    sequences = packed_sequences(block)
    for start in range(0, len(sequences), micro_batch_size):
        yield collate(sequences[start : start + micro_batch_size], pad_id, filler=filler)


def packed_sequences(block: pa.Table) -> list[PackedSequence]:
    """The sequences of a block, as arrays."""
    names = ("input_ids", "loss_mask", "lengths", "media", "rope")
    columns: Sequence[pa.ChunkedArray] = [block.column(name) for name in names]
    return [
        PackedSequence(ids.values.to_numpy(), mask.values.to_numpy(), lengths.as_py(), _media(media), _rope(rope, ids))
        for ids, mask, lengths, media, rope in zip(*columns, strict=True)
    ]


def _media(cell: pa.ListScalar) -> list[Features]:
    return [load(content) for content in cell.as_py()]


def _rope(cell: pa.ListScalar, ids: pa.ListScalar) -> np.ndarray | None:
    """[A, T], from the axes one after the other."""
    return cell.values.to_numpy().reshape(-1, len(ids.values)) if cell.is_valid else None


def _step_input(block: pa.Table, batches: tuple[PackedBatch, ...], *, full: bool) -> StepInput:
    keys = block.column("rows").to_pylist()
    return StepInput(
        micro_batches=batches,
        num_sequences=block.num_rows,
        num_tokens=sum(map(sum, block.column("lengths").to_pylist())),
        num_rows=sum(key >= 0 for one in keys for key in one),
        num_rows_visited=sum(block.column("visited").to_pylist()),
        position=_position_after(block) if full else None,
        bad_rows=tuple(BadRow(**json.loads(text)) for one in block.column("bad").to_pylist() for text in one),
        rows=block_rows(block),
        layout=_layout(block),
    )


def _layout(block: pa.Table) -> tuple[int, str] | None:
    """The last chunk that begins in a block, with its layout."""
    found = [
        pair for pair in zip(*(block.column(name).to_pylist() for name in ("chunk", "layout")), strict=True) if pair[1]
    ]
    return found[-1] if found else None


def _position_after(block: pa.Table) -> tuple[int, int]:
    """The place behind the last sequence of a block: in its chunk, or at the start of the next."""
    chunk, last, count = (block.column(name)[-1].as_py() for name in ("chunk", "sequence", "num_sequences"))
    return (chunk + 1, 0) if last + 1 == count else (chunk, last + 1)
