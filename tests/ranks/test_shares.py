"""Ranks that compute on the same rows are handed them by the one that reads."""

from __future__ import annotations

from typing import Any

import pytest

from rayswift.planning.layout import Layout, Seat
from rayswift.training.shares import Shares
from tests.loop_cases import step_input
from tests.ranks.forked import run_ranks


def read_shares(rank: int, layout: Layout) -> list[int]:
    """How many rows the shares have that a rank is handed, of a stream that only leaders can open."""
    seat = Seat(layout, rank)

    def steps() -> Any:
        assert seat.data_leader(seat.data_rank) == rank, "only leaders read"
        for number in range(3):
            yield step_input([], position=(seat.data_rank, number))
        raise ValueError("the stream is broken")

    shares = Shares(seat, steps)
    found = [next(shares).position for _ in range(3)]
    with pytest.raises((ValueError, RuntimeError), match="the stream is broken"):
        next(shares)
    shares.close()
    return [number for position in found if position for number in position]


def test_ranks_that_compute_on_the_same_rows_are_handed_them_by_one() -> None:
    layout = Layout(pp=2, dp_shard=2)
    assert run_ranks(read_shares, 4, layout) == [[rank % 2, 0, rank % 2, 1, rank % 2, 2] for rank in range(4)]
