"""Locality: who sits next to whom, so that the ranks that talk most share a node. Knows node names, not Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import lcm
from typing import TypeVar

from rayswift.planning.layout import Layout

_T = TypeVar("_T")
# The node that all ranks of a block are on, None when there are several; and the ranks, in the order of their places.
_Block = tuple[str | None, tuple[int, ...]]


def arrange(nodes: Sequence[str], layout: Layout) -> tuple[int, ...] | None:
    """The rank that sits at each place, given the node of each rank; None when a tp group must cross nodes.

    Every tensor parallel group lies inside one node. Of the groups around it, cp, then ep, dp_shard and dp_replicate,
    as many as possible do. The order stays as it is when it is as good.
    """
    assert len(nodes) == layout.world_size, f"{len(nodes)} nodes for {layout.world_size} ranks"
    blocks: list[_Block] = [(node, (rank,)) for rank, node in enumerate(nodes)]
    for size in _block_sizes(layout):
        blocks = _merged(blocks, size // len(blocks[0][1]))
        if size == layout.tp and any(node is None for node, _ in blocks):
            return None
    order = tuple(rank for _, ranks in blocks for rank in ranks)
    unchanged = tuple(range(layout.world_size))
    as_good = _num_local(unchanged, nodes, layout) == _num_local(order, nodes, layout)
    return unchanged if as_good else order


def _block_sizes(layout: Layout) -> list[int]:
    """Ranks in a block of neighbours, from the innermost axis on; each size divides the next."""
    tp, copy = layout.tp, layout.dp_shard * layout.cp * layout.tp
    sizes = [tp, layout.cp * tp, lcm(layout.cp, layout.ep) * tp, copy, layout.dp_replicate * copy, layout.world_size]
    return list(dict.fromkeys(sizes))


def _merged(blocks: Sequence[_Block], count: int) -> list[_Block]:
    """Blocks of `count` of these: first as many as there are inside one node, then what is left of each node."""
    of_node: dict[str | None, list[_Block]] = {}
    for block in blocks:
        of_node.setdefault(block[0], []).append(block)
    merged: list[_Block] = []
    left: list[_Block] = []
    mixed = of_node.pop(None, [])
    for node, mine in of_node.items():
        whole = len(mine) - len(mine) % count
        merged += [(node, _ranks(part)) for part in _cut(mine[:whole], count)]
        left += mine[whole:]
    merged += [(None, _ranks(part)) for part in _cut(left + mixed, count)]
    return sorted(merged, key=lambda block: min(block[1]))


def _cut(things: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    return (things[start : start + size] for start in range(0, len(things), size))


def _ranks(blocks: Sequence[_Block]) -> tuple[int, ...]:
    return tuple(rank for _, ranks in blocks for rank in ranks)


def _num_local(order: Sequence[int], nodes: Sequence[str], layout: Layout) -> list[int]:
    """How many blocks of each size lie inside one node."""
    return [
        sum(len({nodes[rank] for rank in block}) == 1 for block in _cut(order, size)) for size in _block_sizes(layout)
    ]
