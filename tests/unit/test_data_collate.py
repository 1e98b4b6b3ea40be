"""A batch never lets a position see or predict another document."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayswift.data.collate import PackedSequence, collate

PAD = 0


def sequence(*lengths: int) -> PackedSequence:
    ids = np.array([100 * (d + 1) + t for d, length in enumerate(lengths) for t in range(length)], dtype=np.int32)
    return PackedSequence(ids, np.array([int(i % 3 != 0) for i in range(len(ids))], dtype=np.int8), list(lengths))


@given(st.lists(st.lists(st.integers(1, 12), max_size=5), max_size=4))
def test_the_invariant_of_packed_batch(shapes: list[list[int]]) -> None:
    sequences = [sequence(*lengths) for lengths in shapes]
    batch = collate(sequences, PAD)
    size = batch.input_ids_BT.shape
    assert size == (max(1, len(shapes)), size[1])
    assert size[1] % 8 == 0
    assert all(t.shape == size for t in (batch.position_ids_BT, batch.targets_BT, batch.weights_BT))
    for b, (lengths, packed) in enumerate(zip(shapes, sequences, strict=True)):
        position = 0
        for length in [*lengths, size[1] - sum(lengths)]:
            assert batch.position_ids_BT[b, position : position + length].tolist() == list(range(length))
            position += length
        ends = set(np.cumsum(lengths).tolist())
        for t in range(size[1]):
            same_document = t + 1 < sum(lengths) and t + 1 not in ends
            if same_document:
                assert batch.targets_BT[b, t] == packed.input_ids[t + 1]
                assert batch.targets_BT[b, t] // 100 == batch.input_ids_BT[b, t] // 100
                assert batch.weights_BT[b, t] == packed.loss_mask[t + 1]
            else:
                assert batch.weights_BT[b, t] == 0
        assert (batch.input_ids_BT[b, sum(lengths) :] == PAD).all()


def test_no_sequences_make_a_row_of_padding() -> None:
    batch = collate([], 7)
    assert batch.input_ids_BT.tolist() == [[7] * 8]
    assert batch.position_ids_BT.tolist() == [list(range(8))]
    assert not batch.weights_BT.any()
    assert (batch.input_ids_BT.dtype, batch.weights_BT.dtype) == (torch.int64, torch.float32)


def test_two_documents() -> None:
    batch = collate([PackedSequence(np.array([1, 2, 3, 4, 5]), np.array([0, 1, 1, 0, 1]), [3, 2])], PAD)
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.targets_BT.tolist() == [[2, 3, 0, 5, 0, 0, 0, 0]]
    assert batch.weights_BT.tolist() == [[1, 1, 0, 1, 0, 0, 0, 0]]
