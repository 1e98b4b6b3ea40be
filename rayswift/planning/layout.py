"""Layout: how the ranks of a run are arranged, tensor parallel ranks innermost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes, outermost first: pp, dp_replicate, dp_shard, cp, tp. Their product is the world size.

    `ep` re-uses data parallel ranks and does not multiply the world.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        assert min(asdict(self).values()) >= 1, f"every axis of {self} is at least 1"

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

    def coordinate(self, rank: int) -> dict[str, int]:
        """Axis name -> index of this rank; a bijection between ranks and coordinates."""
        assert 0 <= rank < self.world_size, f"rank {rank} of {self.world_size}"
        place: dict[str, int] = {}
        for name, size in reversed(self.axes):
            rank, place[name] = divmod(rank, size)
        return place

    def data_rank(self, rank: int) -> int:
        """Which share of the rows this rank reads; ranks of one tp, cp or pp group read the same."""
        place = self.coordinate(rank)
        return place["dp_replicate"] * self.dp_shard + place["dp_shard"]

    def describe(self) -> str:
        """The axes larger than one, like `dp_shard=4 tp=2`."""
        sizes = {name: size for name, size in asdict(self).items() if size > 1}
        return " ".join(f"{name}={size}" for name, size in sizes.items()) or "one process"
