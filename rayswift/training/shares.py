"""One rank of each data group reads rows; those that compute on the same rows are handed each step's share.

Ray Data hands a block out once. Were the ranks of a tensor, context or pipeline parallel group to read the same split,
each would get some of its blocks, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from rayswift.data.types import StepInput
from rayswift.errors import RaySwiftError
from rayswift.planning.layout import Layout, Seat
from rayswift.training.prefetch import Prefetched

_PATIENCE = timedelta(days=1)  # rows may be slow to come; a rank that dies ends the wait at once


class Shares:
    """This rank's share of each step, the same on all ranks of its data group, which take each step together."""

    def __init__(self, seat: Seat, open_steps: Callable[[], Iterable[StepInput]]) -> None:
        """Made by all ranks; `open_steps` is called by the first rank of each data group alone, in a thread."""
        self._leader = seat.data_leader(seat.data_rank)
        self._group = _data_group(seat)
        self._steps = Prefetched(open_steps) if seat.rank == self._leader else None

    def __iter__(self) -> Iterator[StepInput]:
        return self

    def __next__(self) -> StepInput:
        if self._group is None:
            assert self._steps is not None, "a rank that is alone leads"
            return next(self._steps)
        if self._steps is None:
            return self._received()
        try:
            share = next(self._steps)
        except Exception as error:
            self._send(error if isinstance(error, RaySwiftError) else RuntimeError(f"rank {self._leader}: {error}"))
            raise
        self._send(share)
        return share

    def close(self) -> None:
        """Stop reading ahead."""
        if self._steps is not None:
            self._steps.close()

    def _send(self, item: Any) -> None:
        dist.broadcast_object_list([item], src=self._leader, group=self._group)

    def _received(self) -> StepInput:
        box: list[Any] = [None]
        dist.broadcast_object_list(box, src=self._leader, group=self._group)
        if isinstance(box[0], Exception):
            raise box[0]
        share: StepInput = box[0]
        return share


def _data_group(seat: Seat) -> dist.ProcessGroup | None:
    """The gloo group of the ranks that compute on this rank's rows, None where it is alone. Called by all ranks."""
    mine = None
    if seat.layout.world_size > seat.data_size:
        for ranks in _members(seat.layout, seat.order):
            group = dist.new_group(ranks, backend="gloo", timeout=_PATIENCE)
            mine = group if seat.rank in ranks else mine
    return mine


def _members(layout: Layout, order: tuple[int, ...]) -> list[list[int]]:
    """The ranks of each data group, by data rank."""
    places = range(layout.world_size)
    return [
        sorted(order[place] for place in places if layout.data_rank(place) == data_rank)
        for data_rank in range(layout.data_size)
    ]
