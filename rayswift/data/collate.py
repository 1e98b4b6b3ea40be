"""Sequences -> PackedBatch: padding, positions that restart with every document, targets that never leave one.

Shape legend: B sequences in a micro-batch, T tokens in a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rayswift.data.types import PackedBatch


@dataclass(frozen=True)
class PackedSequence:
    """Documents laid end to end: `lengths` sums to the length of `input_ids` and of `loss_mask` (weights >= 0)."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    lengths: Sequence[int]

    def __post_init__(self) -> None:
        assert sum(self.lengths) == len(self.input_ids) == len(self.loss_mask), "lengths cover the tokens"


def collate(sequences: Sequence[PackedSequence], pad_id: int, multiple_of: int = 8) -> PackedBatch:
    """The sequences as a [B, T] batch; T is the longest one, rounded up to `multiple_of`.

    No sequences give a batch of one row of padding, so that every rank can take part in every forward pass.
    """
    longest = max((len(sequence.input_ids) for sequence in sequences), default=1)
    shape = (max(1, len(sequences)), max(1, -(-longest // multiple_of)) * multiple_of)
    input_ids_BT = np.full(shape, pad_id, dtype=np.int64)
    position_ids_BT = np.tile(np.arange(shape[1], dtype=np.int64), (shape[0], 1))
    targets_BT = np.full(shape, pad_id, dtype=np.int64)
    weights_BT = np.zeros(shape, dtype=np.float32)
    for b, sequence in enumerate(sequences):
        length = len(sequence.input_ids)
        starts = np.cumsum([0, *sequence.lengths])
        input_ids_BT[b, :length] = sequence.input_ids
        before = slice(0, max(0, length - 1))
        targets_BT[b, before], weights_BT[b, before] = sequence.input_ids[1:], sequence.loss_mask[1:]
        lasts = starts[1:] - 1  # a document's last token predicts nothing, least of all the next document's first
        targets_BT[b, lasts], weights_BT[b, lasts] = pad_id, 0.0
        for start in starts[1:]:
            position_ids_BT[b, start:] = np.arange(shape[1] - start)
    return PackedBatch(
        torch.from_numpy(input_ids_BT),
        torch.from_numpy(position_ids_BT),
        torch.from_numpy(targets_BT),
        torch.from_numpy(weights_BT),
    )
