"""Layout: how the ranks of a run are arranged, tensor parallel ranks innermost; Seat: where one process sits in it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes, outermost first: pp, dp_replicate, dp_shard, cp, tp. Their product is the world size.

    `ep` re-uses the ranks of dp_shard, which it divides, and does not multiply the world.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        assert min(asdict(self).values()) >= 1, f"every axis of {self} is at least 1"
        assert self.dp_shard % self.ep == 0, f"ep of {self} divides dp_shard"

    @property
    def axes(self) -> tuple[tuple[str, int], ...]:
        """(name, size) of each mesh axis, outermost first."""
        return tuple((name, getattr(self, name)) for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp"))

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return prod(size for _, size in self.axes)

    @property
    def data_size(self) -> int:
        """Number of ranks that read different rows."""
        return self.dp_replicate * self.dp_shard

    def coordinate(self, place: int) -> dict[str, int]:
        """Axis name -> index of this place; a bijection between places and coordinates."""
        assert 0 <= place < self.world_size, f"place {place} of {self.world_size}"
        index: dict[str, int] = {}
        for name, size in reversed(self.axes):
            place, index[name] = divmod(place, size)
        return index

    def data_rank(self, place: int) -> int:
        """Which share of the rows this place reads; those of one tp, cp or pp group read the same."""
        index = self.coordinate(place)
        return index["dp_replicate"] * self.dp_shard + index["dp_shard"]

    def describe(self) -> str:
        """The axes larger than one, like `dp_shard=4 tp=2`."""
        sizes = {name: size for name, size in asdict(self).items() if size > 1}
        return " ".join(f"{name}={size}" for name, size in sizes.items()) or "one process"


@dataclass(frozen=True)
class Seat:
    """Where one process sits: process `rank` of the group has the place of the mesh at which `order` names it.

    `order[place]` is the rank that sits there. It is a permutation of the ranks, the same on all of them, and the
    identity but where processes had to change seats so that a tensor parallel group stays on one node.
    """

    layout: Layout
    rank: int = 0
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.order:
            object.__setattr__(self, "order", tuple(range(self.layout.world_size)))
        assert sorted(self.order) == list(range(self.layout.world_size)), f"{self.order} is no order of the ranks"

    @property
    def place(self) -> int:
        """The place of this process on the mesh."""
        return self.order.index(self.rank)

    @property
    def coordinate(self) -> dict[str, int]:
        """Axis name -> index of this process."""
        return self.layout.coordinate(self.place)

    @property
    def data_rank(self) -> int:
        """Which share of the rows this process reads, 0 to `data_size - 1`."""
        return self.layout.data_rank(self.place)

    @property
    def data_size(self) -> int:
        """Number of shares the rows are split into."""
        return self.layout.data_size

    def data_leader(self, data_rank: int) -> int:
        """The rank of the first process that reads this share: it speaks for the others that do."""
        places = range(self.layout.world_size)
        return self.order[next(place for place in places if self.layout.data_rank(place) == data_rank)]
