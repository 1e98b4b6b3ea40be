"""Sequences -> PackedBatch: padding, positions that restart with every document, targets that never leave one.

Shape legend: B sequences in a micro-batch, T tokens in a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rayswift.data.media.features import model_features
from rayswift.data.types import Features, PackedBatch


@dataclass(frozen=True)
class PackedSequence:
    """Documents laid end to end: `lengths` sums to the length of `input_ids` and of `loss_mask` (weights >= 0)."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    lengths: Sequence[int]
    media: Sequence[Features] = ()
    rope_AT: np.ndarray | None = None

    def __post_init__(self) -> None:
        assert sum(self.lengths) == len(self.input_ids) == len(self.loss_mask), "lengths cover the tokens"


def collate(
    sequences: Sequence[PackedSequence], pad_id: int, multiple_of: int = 8, *, filler: Filler | None = None
) -> PackedBatch:
    """The sequences as a [B, T] batch; T is the longest one, rounded up to `multiple_of`.

    No sequences give a batch of one row of padding, so that every rank can take part in every forward pass. With a
    `filler` every batch has media of each kind, if need be in a row that counts nothing: a rank whose batch has no
    image would not run the vision tower, and the others would wait for it forever.
    """
    if filler is not None and (missing := filler.missing(sequences)):
        sequences = [*sequences, missing]
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
        _rope(sequences, position_ids_BT),
        model_features([features for sequence in sequences for features in sequence.media]),
    )


def joined(sequences: Sequence[PackedSequence]) -> PackedSequence:
    """The sequences laid end to end. Where some have rope positions, the others get the plain ones on each axis."""
    axes = next((len(one.rope_AT) for one in sequences if one.rope_AT is not None), 0)
    plain = [np.concatenate([np.arange(length) for length in one.lengths]) for one in sequences]
    ropes = [
        np.tile(positions, (axes, 1)) if one.rope_AT is None else one.rope_AT
        for one, positions in zip(sequences, plain, strict=True)
    ]
    return PackedSequence(
        np.concatenate([one.input_ids for one in sequences]),
        np.concatenate([one.loss_mask for one in sequences]),
        [length for one in sequences for length in one.lengths],
        [features for one in sequences for features in one.media],
        np.concatenate(ropes, axis=1) if axes else None,
    )


@dataclass(frozen=True)
class Filler:
    """A document of weight 0 with the smallest medium of a kind, for each kind that a stream has.

    A batch without it has none of the kind: it is known by the names of its features.
    """

    documents: Mapping[str, PackedSequence]

    def missing(self, sequences: Sequence[PackedSequence]) -> PackedSequence | None:
        """The documents, end to end, of the kinds that no sequence has; None where none is missing."""
        names = {name for sequence in sequences for features in sequence.media for name in features}
        left = [document for document in self.documents.values() if not names >= set(document.media[0])]
        return joined(left) if left else None


def _rope(sequences: Sequence[PackedSequence], position_ids_BT: np.ndarray) -> torch.Tensor | None:
    """Rope positions [A, B, T]; padding has the plain ones, as on every axis of a text."""
    found = next((sequence.rope_AT for sequence in sequences if sequence.rope_AT is not None), None)
    if found is None:
        return None
    rope_ABT = np.tile(position_ids_BT, (len(found), 1, 1))
    for b, sequence in enumerate(sequences):
        if sequence.rope_AT is not None:
            rope_ABT[:, b, : sequence.rope_AT.shape[1]] = sequence.rope_AT
    return torch.from_numpy(rope_ABT)
