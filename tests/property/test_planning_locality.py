"""The order of ranks: a permutation with every tensor parallel group on one node, refused only when there is none."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayswift.planning.layout import Layout
from rayswift.planning.locality import arrange
from rayswift.planning.placement import whole_groups

sizes = st.integers(1, 3)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    dp_shard = draw(sizes)
    ep = draw(st.sampled_from([size for size in range(1, dp_shard + 1) if dp_shard % size == 0]))
    return Layout(dp_replicate=draw(sizes), dp_shard=dp_shard, cp=draw(sizes), tp=draw(sizes), pp=draw(sizes), ep=ep)


@st.composite
def placed(draw: st.DrawFn) -> tuple[list[str], Layout]:
    """A layout and the node of each rank: in any order, or grouped by node as Ray hands out ranks."""
    layout = draw(layouts())
    nodes = draw(st.lists(st.sampled_from("ABCD"), min_size=layout.world_size, max_size=layout.world_size))
    return (sorted(nodes) if draw(st.booleans()) else nodes), layout


@st.composite
def placed_in_groups(draw: st.DrawFn) -> tuple[list[str], Layout]:
    """The same where every node has whole tensor parallel groups, its ranks scattered."""
    layout = draw(layouts())
    count = layout.world_size // layout.tp
    groups = draw(st.lists(st.sampled_from("ABCD"), min_size=count, max_size=count))
    return draw(st.permutations([node for node in groups for _ in range(layout.tp)])), layout


def local(order: tuple[int, ...], nodes: list[str], size: int) -> int:
    """How many blocks of this many neighbouring places lie on one node."""
    return sum(len({nodes[r] for r in order[i : i + size]}) == 1 for i in range(0, len(order), size))


@given(st.one_of(placed(), placed_in_groups()))
def test_every_group_is_on_one_node_unless_that_is_impossible(case: tuple[list[str], Layout]) -> None:
    nodes, layout = case
    order, counts, groups = arrange(nodes, layout), Counter(nodes), layout.world_size // layout.tp
    if sum(count // layout.tp for count in counts.values()) < groups:
        assert order is None
        return
    assert order is not None
    assert sorted(order) == list(range(layout.world_size))
    assert local(order, nodes, layout.tp) == groups


@given(placed_in_groups())
def test_as_many_of_the_groups_around_are_on_one_node_as_can_be(case: tuple[list[str], Layout]) -> None:
    nodes, layout = case
    order, counts = arrange(nodes, layout), Counter(nodes)
    assert order is not None
    copy = layout.dp_shard * layout.cp * layout.tp
    for size in (layout.cp * layout.tp, copy, layout.dp_replicate * copy):
        assert local(order, nodes, size) == sum(count // size for count in counts.values())


@given(placed_in_groups())
def test_an_order_that_is_good_is_left_alone(case: tuple[list[str], Layout]) -> None:
    nodes, layout = case
    order = arrange(nodes, layout)
    assert order is not None
    unchanged = tuple(range(layout.world_size))
    assert arrange([nodes[rank] for rank in order], layout) == unchanged
    assert arrange(["A"] * layout.world_size, layout) == unchanged


@pytest.mark.parametrize(
    ("nodes", "layout", "order"),
    [
        ("AABB", Layout(tp=2, dp_shard=2), (0, 1, 2, 3)),
        ("ABAB", Layout(tp=2, dp_shard=2), (0, 2, 1, 3)),
        ("ABBC", Layout(cp=2, dp_shard=2), (1, 2, 0, 3)),  # one context parallel group is saved
        ("ABBC", Layout(dp_replicate=2, dp_shard=2), (1, 2, 0, 3)),
        ("ABBC", Layout(dp_shard=4), (0, 1, 2, 3)),
        ("ABBBBC", Layout(dp_shard=6, ep=3), (1, 2, 3, 0, 4, 5)),
        ("ABBA", Layout(tp=2, pp=2), (0, 3, 1, 2)),
        ("ABBC", Layout(tp=2, dp_shard=2), None),
        ("AAAB", Layout(tp=2, dp_shard=2), None),
        ("AB", Layout(tp=2), None),
    ],
)
def test_the_order_of_a_few_places(nodes: str, layout: Layout, order: tuple[int, ...] | None) -> None:
    assert arrange(list(nodes), layout) == order


@given(st.dictionaries(st.sampled_from("ABCD"), st.integers(0, 9), min_size=1), st.integers(1, 4), st.integers(1, 6))
def test_what_is_sent_to_nodes_in_whole_groups_needs_no_other_order(
    room: dict[str, int], group: int, count: int
) -> None:
    chosen = whole_groups(room, group * count, group)
    if chosen is None:
        assert sum(workers // group for workers in room.values()) < count
    elif chosen:
        assert arrange(list(chosen), Layout(tp=group, dp_shard=count)) == tuple(range(group * count))
        assert all(chosen.count(node) <= room[node] for node in room)
