"""Packing conserves documents, never overfills a sequence, and leaves little empty."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayswift.data.packing import fill, pack


@given(lengths=st.lists(st.integers(0, 64), max_size=200), max_length=st.integers(64, 100))
def test_every_document_is_in_one_bin_that_holds_it(lengths: list[int], max_length: int) -> None:
    bins = pack(lengths, max_length)
    assert sorted(index for one in bins for index in one) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in one) <= max_length for one in bins)
    assert bins == pack(lengths, max_length)


@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_no_two_bins_could_be_one(lengths: list[int]) -> None:
    """All bins but one are more than half full, as first fit guarantees."""
    bins = pack(lengths, 64)
    used = sorted(sum(lengths[index] for index in one) for one in bins)
    assert all(a + b > 64 for a, b in itertools.pairwise(used))


def test_a_document_over_the_length_is_refused() -> None:
    with pytest.raises(ValueError, match="document 1 has 9 tokens, over max_length=8"):
        pack([8, 9], 8)


def test_fill_on_gsm8k_is_over_99_percent(shared_data: Path) -> None:
    """Lengths as a tokenizer of 3.6 characters per token gives, in chunks of 2,048 rows as the stream makes them."""
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    lengths = [12 + int(len(row["question"] + row["answer"]) / 3.6) for row in rows]
    for start in range(0, 6144, 2048):
        chunk = lengths[start : start + 2048]
        assert fill(chunk, pack(chunk, 1024), 1024) > 0.99
