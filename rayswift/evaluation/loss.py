"""The held-out loss of a loaded model: the rows as training prepares them, without packing and without gradients.

The loss is that of `Evaluator.loss` of a run: a `LossSum` over all tokens that count.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rayswift.data.blocks import packed_sequences
from rayswift.data.collate import PackedSequence, collate
from rayswift.data.prepare import prepare_chunk
from rayswift.data.quarantine import place
from rayswift.data.stream import StreamPlan
from rayswift.data.types import BadRow
from rayswift.methods.sft import Sft
from rayswift.parallel.forward import batch_logprobs, to_device
from rayswift.training.evaluate import LossSum

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rayswift.data.media.encoder import MediaEncoder

_BATCH_TOKENS = 2048
"""Positions of a forward pass, padding included, unless one row alone is longer."""


@dataclass
class HeldOut:
    """What was measured. `rows`, `cut` and `unusable` are keys of rows."""

    total: LossSum = field(default_factory=LossSum)
    num_tokens: int = 0
    num_trained_tokens: int = 0
    rows: set[int] = field(default_factory=set)
    cut: set[int] = field(default_factory=set)
    unusable: set[int] = field(default_factory=set)
    refused: list[str] = field(default_factory=list)

    def add_rows(self, table: pa.Table) -> None:
        """Account for the rows of a chunk."""
        columns = (table.column(name).to_pylist() for name in ("rows", "cut", "bad_rows", "bad"))
        for keys, cut, bad_keys, bad in zip(*columns, strict=True):
            rows = [key if key >= 0 else ~key for key in keys]
            self.rows |= set(rows)
            self.cut |= {row for row, was_cut in zip(rows, cut, strict=True) if was_cut}
            self.unusable |= set(bad_keys)
            found = [BadRow(**json.loads(text)) for text in bad]
            self.refused += [f"{place(row)}: {row.reason}" for row in found]


def measure(
    model: PreTrainedModel, plan: StreamPlan, tokenizer: PreTrainedTokenizerBase, media: MediaEncoder | None = None
) -> HeldOut:
    """The loss of the model on all rows of a plan, and what became of each row."""
    import torch

    found, method = HeldOut(), Sft(Sft.Config())
    pad_id = tokenizer.pad_token_id or 0
    model.eval()
    for index in range(plan.num_chunks):
        table = prepare_chunk(plan, index, tokenizer, media)
        found.add_rows(table)
        for sequences in _batches(packed_sequences(table)):
            batch = to_device(collate(sequences, pad_id), model.device)
            with torch.inference_mode():
                found.total.add(method, batch_logprobs(model, batch), batch)
            found.num_tokens += sum(len(one.input_ids) for one in sequences)
            found.num_trained_tokens += int((batch.weights_BT > 0).sum())
    return found


def _batches(sequences: Sequence[PackedSequence]) -> Iterator[list[PackedSequence]]:
    """Sequences of about one length together, the longest first; a chunk without a usable row has only an empty one."""
    batch: list[PackedSequence] = []
    for one in sorted(sequences, key=lambda sequence: -len(sequence.input_ids)):
        if batch and (len(batch) + 1) * len(batch[0].input_ids) > _BATCH_TOKENS:
            yield batch
            batch = []
        if len(one.input_ids):
            batch.append(one)
    if batch:
        yield batch
