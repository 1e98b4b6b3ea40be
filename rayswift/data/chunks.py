"""The chunks of a stream that a ledger leaves to do, and what is left in each.

Loads no torch: the process that deals out the stream of a run needs none, and importing it took half of its start.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pyarrow as pa

from rayswift.data.chunk_layout import ChunkLayout
from rayswift.data.ledger import Ledger
from rayswift.data.prepare import prepare_part
from rayswift.data.stream import FIRST_CHUNK_ROWS, StreamPlan
from rayswift.data.token_cache import kept_chunk

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rayswift.data.media.encoder import MediaEncoder


def chunks_left(plan: StreamPlan, ledger: Ledger) -> range:
    """The chunks that are not yet trained on to their end."""
    return range(plan.position(ledger)[0], plan.num_chunks)


def chunk_from(
    plan: StreamPlan,
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    ledger: Ledger,
    media: MediaEncoder | None = None,
    least: int | None = None,
) -> pa.Table:
    """The sequences of chunk `index` that come after `ledger`.

    Where the ledger has the chunk's layout and `least` is given, so many of them and about as many rows as a fresh
    start prepares first, if that is more.
    """
    first_chunk, consumed = plan.position(ledger)
    if index == first_chunk and consumed and ledger.layout:
        layout = ChunkLayout.from_json(ledger.layout)
        if layout.chunk == index:
            count = layout.count_for(consumed, FIRST_CHUNK_ROWS if least else sys.maxsize)
            stop = min(consumed + max(count, least or 0), len(layout.sequences))
            return prepare_part(plan, layout, range(consumed, stop), tokenizer, media)
    table = kept_chunk(plan, index, tokenizer, media)
    return table.slice(consumed) if index == first_chunk else table
