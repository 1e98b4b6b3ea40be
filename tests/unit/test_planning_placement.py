"""Where workers go: node shapes from labels, tensor parallel groups on one node, cores left for the data."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from rayswift.errors import PlanError
from rayswift.planning.hardware import GB, ClusterSpec, NodeSpec
from rayswift.planning.layout import Layout
from rayswift.planning.node_shapes import NODE_SHAPES, find_shape, gpu_of
from rayswift.planning.placement import Placement, place, room_for, whole_groups
from rayswift.planning.planner import Plan, plan
from tests.job_cases import CPU_BOX, ENGINES, SMALL_SHAPE, gpu_cluster, make_job


def gpu_nodes(*counts: int, cpus: float = 96, shape: str = "a100-8x80") -> ClusterSpec:
    """A cluster of nodes with so many A100s each, and a head without any."""
    nodes = [NodeSpec(f"n{i}", num_devices=count, num_cpus=cpus, shape=shape) for i, count in enumerate(counts)]
    return of_nodes(*nodes)


def of_nodes(*nodes: NodeSpec) -> ClusterSpec:
    head = NodeSpec("head", num_devices=0, num_cpus=0)
    cluster = gpu_cluster(sum(n.num_devices for n in nodes), num_cpus=sum(n.num_cpus for n in nodes))
    return replace(cluster, nodes=(head, *nodes))


def cpu_nodes(*counts: float) -> ClusterSpec:
    nodes = tuple(NodeSpec(f"n{i}", num_devices=0, num_cpus=count) for i, count in enumerate(counts))
    return replace(CPU_BOX, num_cpus=sum(counts), nodes=nodes)


@pytest.mark.parametrize(
    ("name", "memory", "domain", "nvlink", "network"),
    [
        ("a100-8x40", 40, 8, 300, 50),
        ("a100-8x80", 80, 8, 300, 50),
        ("h100-8x80", 80, 8, 450, 400),
        ("h100-8x80-a3-high", 80, 8, 450, 100),
        ("h100-8x80-a3-mega", 80, 8, 450, 200),
        ("h200-8x141", 141, 8, 450, 400),
        ("b200-8x180", 180, 8, 900, 400),
        ("h100-1x80", 80, 1, 450, 12.5),
        ("l40s-8x48", 48, 1, 0, 50),
        ("a100-4x80", 80, 4, 300, None),  # not listed: what clusters/on-premises.yaml makes of half a machine
    ],
)
def test_a_shape_is_known_by_its_name(name: str, memory: int, domain: int, nvlink: int, network: float | None) -> None:
    shape = find_shape(name)
    assert shape is not None
    assert (shape.name, shape.gpu.memory_bytes) == (name, memory * GB)
    assert (shape.nvlink_domain, shape.gpu.nvlink_gb_s, shape.network_gb_s) == (domain, nvlink, network)


@pytest.mark.parametrize("name", ["", "data", "head", "other", "a100", "v100-8x16", "a100-0x80", "a100-8x80 "])
def test_other_labels_are_no_shapes(name: str) -> None:
    assert find_shape(name) is None


def test_only_pcie_bounds_a_group_by_the_node() -> None:
    assert {shape.max_group for shape in NODE_SHAPES.values() if shape.nvlink_domain > 1} == {8}
    assert NODE_SHAPES["l40s-8x48"].max_group == 8


@pytest.mark.parametrize(
    ("labels", "gpu"),
    [
        ({"shape": "h100-8x80", "accelerator_type": "A100"}, "H100"),
        ({"shape": "a100-8x80"}, "A100-80GB"),
        ({"accelerator_type": "A100"}, "A100-40GB"),  # the type does not say which; too little is the safe guess
        ({"accelerator_type": "GeForce-RTX-4090"}, "RTX 4090"),
        ({"accelerator_type": "V100"}, None),
        ({}, None),
    ],
)
def test_the_gpu_of_a_node_is_what_its_labels_say(labels: dict[str, str], gpu: str | None) -> None:
    found = gpu_of(NodeSpec("n", num_devices=8, num_cpus=96, **labels))
    assert (found.name if found else None) == gpu


@pytest.mark.parametrize(
    ("layout", "cluster", "strategy"),
    [
        (Layout(tp=8), gpu_nodes(8, 8), "STRICT_PACK"),
        (Layout(tp=8, dp_shard=2), gpu_nodes(8, 8), "PACK"),
        (Layout(tp=2, dp_shard=3), gpu_nodes(3, 5), "PACK"),
        (Layout(dp_shard=16), gpu_nodes(8, 8), "PACK"),
        (Layout(), gpu_nodes(8), "PACK"),
        (Layout(tp=2), cpu_nodes(4, 4), "STRICT_PACK"),
        (Layout(tp=2), CPU_BOX, "STRICT_PACK"),
    ],
)
def test_one_group_goes_to_one_node_and_several_are_packed(layout: Layout, cluster: ClusterSpec, strategy: str) -> None:
    made = place(layout, cluster)
    assert (made.num_workers, made.strategy, made.label_selector) == (layout.world_size, strategy, {})
    assert made.data_cpus > 0


@pytest.mark.parametrize(
    ("cluster", "workers", "cpus"),
    [
        (gpu_nodes(8, 8, cpus=96), 16, 2.0),
        (gpu_nodes(8, 8, cpus=8), 16, 0.5),
        (gpu_nodes(8, cpus=8), 2, 2.0),
        (of_nodes(NodeSpec("gpus", 8, 8.0), NodeSpec("data", 0, 64.0)), 8, 0.5),  # the data node's cores are no use
        (of_nodes(NodeSpec("big", 8, 96.0), NodeSpec("small", 8, 4.0)), 16, 0.25),
    ],
)
def test_every_node_with_devices_keeps_half_of_its_cores(cluster: ClusterSpec, workers: int, cpus: float) -> None:
    made = place(Layout(dp_shard=workers), cluster)
    assert made.resources_per_worker == {"CPU": cpus, "GPU": 1.0}
    for node in cluster.nodes:
        assert min(node.num_devices, workers) * cpus <= node.num_cpus / 2
    assert made.data_cpus == cluster.num_cpus - cpus * workers > 0


@pytest.mark.parametrize(
    ("layout", "cluster", "message"),
    [
        (Layout(tp=16), gpu_nodes(8, 8), "parallel.tp=16 is more than the 8 workers that one node holds; "
         "a tensor parallel group never crosses nodes; use 8"),
        (Layout(tp=6), gpu_nodes(4, 4), "parallel.tp=6 is more than the 4 workers that one node holds; "
         "a tensor parallel group never crosses nodes; use 3"),
        (Layout(tp=2), gpu_nodes(1, 1, shape="h100-1x80"), "parallel.tp=2 is more than the 1 workers that one node "
         "holds; a tensor parallel group never crosses nodes; use 1, or larger nodes"),
        (Layout(tp=2), cpu_nodes(1, 1, 1, 1), "parallel.tp=2 is more than the 1 workers that one node holds; "
         "a tensor parallel group never crosses nodes; use 1, or larger nodes"),
        (Layout(tp=2, dp_shard=4), gpu_nodes(3, 5), "cluster.workers=8 is 4 groups of parallel.tp=2, and the nodes "
         "hold 3 without one that crosses nodes; use 6, or add nodes"),
        (Layout(tp=3, cp=2, dp_shard=2), gpu_nodes(8, 4), "cluster.workers=12 is 4 groups of parallel.tp=3, and the "
         "nodes hold 3 without one that crosses nodes; use 6, or add nodes"),
        (Layout(tp=3, pp=2), gpu_nodes(4, 2), "cluster.workers=6 is 2 groups of parallel.tp=3, and the nodes hold 1 "
         "without one that crosses nodes; add nodes"),
    ],
)  # fmt: skip
def test_a_group_that_would_cross_nodes_is_refused(layout: Layout, cluster: ClusterSpec, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        place(layout, cluster)
    assert str(caught.value) == message
    assert caught.value.exit_code == 3


def test_the_planner_refuses_before_anything_is_started() -> None:
    engines = {"any": replace(ENGINES["fsdp2"], supports=ENGINES["fsdp2"].supports | {"tp"})}
    shape = replace(SMALL_SHAPE, num_heads=16, num_kv_heads=16)
    with pytest.raises(PlanError, match=r"parallel\.tp=16 is more than the 8 workers"):
        plan(make_job(**{"parallel.tp": 16}), shape, gpu_nodes(8, 8), engines=engines)
    made = plan(make_job(**{"parallel.tp": 8}), shape, gpu_nodes(8, 8), engines=engines)
    assert made.layout == Layout(tp=8, dp_shard=2)
    assert Plan.from_plain(json.loads(json.dumps(made.to_plain()))) == made


@pytest.mark.parametrize(
    ("layout", "shapes", "selector"),
    [
        (Layout(dp_shard=8), ["a100-8x80", "h100-8x80"], {"rayswift.io/node-shape": "h100-8x80"}),
        (Layout(dp_shard=8), ["a100-8x80", "a100-8x40"], {"rayswift.io/node-shape": "a100-8x80"}),
        (Layout(dp_shard=16), ["a100-8x80", "h100-8x80"], {}),  # every device is asked for
        (Layout(dp_shard=16), ["a100-8x80", "h100-8x80", "a100-8x80"], {"rayswift.io/node-shape": "a100-8x80"}),
        (Layout(dp_shard=8), ["h100-8x80", "h100-8x80"], {}),
        (Layout(dp_shard=8), ["", "other"], {}),
    ],
)
def test_workers_share_one_kind_of_node_where_it_is_enough(
    layout: Layout, shapes: list[str], selector: dict[str, str]
) -> None:
    nodes = [NodeSpec(f"n{i}", 8, 96.0, shape=shape) for i, shape in enumerate(shapes)]
    assert place(layout, of_nodes(*nodes)).label_selector == selector


@pytest.mark.parametrize(
    ("free", "need", "room"),
    [
        ({"CPU": 8.0, "GPU": 3.0}, {"CPU": 2.0, "GPU": 1.0}, 3),
        ({"CPU": 4.0, "GPU": 8.0}, {"CPU": 2.0, "GPU": 1.0}, 2),
        ({"CPU": 8.0}, {"CPU": 2.0, "GPU": 1.0}, 0),
        ({"CPU": 0.9999}, {"CPU": 0.3333}, 3),
        ({}, {"CPU": 0.0, "GPU": 1.0}, 0),
        ({"GPU": 2.0}, {"CPU": 0.0, "GPU": 1.0}, 2),
    ],
)
def test_room_is_what_the_scarcest_resource_allows(free: dict[str, float], need: dict[str, float], room: int) -> None:
    assert room_for(free, need) == room


@pytest.mark.parametrize(
    ("room", "num_workers", "group", "nodes"),
    [
        ({"a": 8, "b": 8}, 16, 8, ""),  # Ray packs whole nodes
        ({"a": 3, "b": 5}, 8, 1, ""),
        ({"a": 2}, 4, 2, ""),  # too little, but Ray may wait for it
        ({"a": 3, "b": 5}, 6, 2, "bbbbaa"),  # packed by Ray: three on each
        ({"a": 3, "b": 5}, 4, 2, "bbbb"),
        ({"a": 3, "b": 2}, 2, 2, "aa"),
        ({"a": 3, "b": 5}, 8, 2, None),
        ({"a": 1, "b": 1}, 2, 2, None),
        ({"a": 1, "b": 4, "c": 7}, 8, 4, "bbbbcccc"),
    ],
)
def test_workers_are_sent_to_nodes_in_whole_groups(
    room: dict[str, int], num_workers: int, group: int, nodes: str | None
) -> None:
    found = whole_groups(room, num_workers, group)
    assert found == (None if nodes is None else tuple(nodes))


def test_a_placement_of_an_older_plan_has_no_labels() -> None:
    older: dict[str, Any] = {"num_workers": 1, "resources_per_worker": {"CPU": 1.0}, "strategy": "PACK", "data_cpus": 1}
    assert Placement(**older).label_selector == {}
