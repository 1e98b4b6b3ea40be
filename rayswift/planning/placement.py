"""Placement: the bundles that training workers are given, what is left for Ray Data, and what fits one node.

Pure decisions. A tensor parallel group talks after every layer, so it never crosses the network between nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rayswift.errors import PlanError
from rayswift.planning.hardware import ClusterSpec, NodeSpec
from rayswift.planning.layout import Layout
from rayswift.planning.node_shapes import SHAPE_LABEL, find_shape

_DATA_SHARE = 0.5  # of a node's cores, kept free for reading and tokenizing
_ROUNDING = 1e-6  # what is free is a float: 0.9999999 of a core is a core


@dataclass(frozen=True)
class Placement:
    """`num_workers` bundles of `resources_per_worker`, placed by `strategy`; `data_cpus` stay free for Ray Data.

    `label_selector` names the node labels that every bundle asks for.
    """

    num_workers: int
    resources_per_worker: dict[str, float]
    strategy: str
    data_cpus: float
    label_selector: dict[str, str] = field(default_factory=dict)


def place(layout: Layout, cluster: ClusterSpec) -> Placement:
    """Bundles for the workers of a layout. Raises PlanError when the cluster has too few devices, cores or whole nodes.

    One tensor parallel group that is all there is goes to one node by Ray's own rule. Several are packed by Ray, and
    kept whole by `whole_groups` where nodes are partly taken when the run starts.
    """
    num_workers = layout.world_size
    resources = _on_cpus(num_workers, cluster) if cluster.device == "cpu" else _on_devices(num_workers, cluster)
    nodes = [node for node in cluster.nodes if cluster.device == "cpu" or node.num_devices]
    room = {node.id: _room_for_groups(node, cluster.device, resources) for node in nodes}
    if nodes:
        _check_groups(layout, room)
    return Placement(
        num_workers=num_workers,
        resources_per_worker=resources,
        strategy="STRICT_PACK" if layout.tp == num_workers > 1 else "PACK",
        data_cpus=cluster.num_cpus - resources["CPU"] * num_workers,
        label_selector=_one_kind(layout, nodes, room) if cluster.device != "cpu" else {},
    )


def room_for(free: Mapping[str, float], need: Mapping[str, float]) -> int:
    """How many workers that need these resources fit into what is free on a node."""
    return int(min((free.get(name, 0.0) / amount + _ROUNDING for name, amount in need.items() if amount), default=0))


def num_groups(room: Iterable[int], group: int) -> int:
    """How many groups of this many workers fit, each on one node."""
    return sum(workers // group for workers in room)


def whole_groups(room: Mapping[str, int], num_workers: int, group: int) -> tuple[str, ...] | None:
    """The node of each worker such that every group of neighbours is on one node; None when they do not fit.

    Empty where Ray's own packing cannot do wrong: it fills one node after the other, and each takes whole groups. Then
    a node that is lost meanwhile, or still to come, is Ray's affair.
    """
    if group == 1 or all(workers % group == 0 for workers in room.values()):
        return ()
    left = {node: workers - workers % group for node, workers in room.items() if workers >= group}
    chosen: list[str] = []
    while len(chosen) < num_workers and left:
        missing = num_workers - len(chosen)
        enough = [node for node in left if left[node] >= missing]
        node = min(enough, key=left.__getitem__) if enough else max(left, key=left.__getitem__)
        chosen += [node] * min(missing, left.pop(node))
    return tuple(chosen) if len(chosen) == num_workers else None


def _on_devices(num_workers: int, cluster: ClusterSpec) -> dict[str, float]:
    """A device each, and cores that every node with devices has twice over. Raises PlanError for too few devices."""
    if num_workers > cluster.num_devices:
        raise PlanError(
            f"is more than the {cluster.num_devices} {cluster.device} devices of the cluster",
            path="cluster.workers",
            value=num_workers,
            fix=f"use at most {cluster.num_devices}, or add nodes",
        )
    # Cores of other nodes are of no use to a worker: a bundle lies on the node of its device.
    shares = [node.num_cpus / min(node.num_devices, num_workers) for node in cluster.nodes if node.num_devices]
    cpus = min([2.0, *(_DATA_SHARE * share for share in shares or [cluster.num_cpus / num_workers])])
    accelerator = device_resource(cluster.device)
    return {"CPU": cpus} if accelerator is None else {"CPU": cpus, accelerator: 1.0}


def device_resource(device: str) -> str | None:
    """Ray's name for a kind of device; None for those that Ray does not count."""
    if device in ("cpu", "mps"):
        return None
    return "GPU" if device in ("cuda", "xpu") else device.upper()


def _on_cpus(num_workers: int, cluster: ClusterSpec) -> dict[str, float]:
    """CPU workers share half of the cores: fewer starve the step, more starve Ray Data and the run stands still."""
    most = max(1, int(4 * cluster.num_cpus))
    if num_workers > most:
        raise PlanError(
            f"is too many for {cluster.num_cpus:g} CPUs",
            path="cluster.workers",
            value=num_workers,
            fix=f"use at most {most}",
        )
    return {"CPU": round(min(1.0, _DATA_SHARE * cluster.num_cpus / num_workers), 3)}


def _room_for_groups(node: NodeSpec, device: str, need: Mapping[str, float]) -> int:
    """How many workers a whole node holds that may be in one tensor parallel group."""
    accelerator = device_resource(device)
    room = room_for({"CPU": node.num_cpus, **({accelerator: node.num_devices} if accelerator else {})}, need)
    shape = find_shape(node.shape) if accelerator else None
    return room if shape is None else min(room, shape.max_group)


def _check_groups(layout: Layout, room: Mapping[str, int]) -> None:
    """Raises PlanError when a tensor parallel group, or all of them together, would have to cross nodes."""
    largest, tp = max(room.values()), layout.tp
    if tp > 1 and tp > largest:
        fits = max((size for size in range(1, largest + 1) if tp % size == 0), default=1)
        raise PlanError(
            f"is more than the {largest} workers that one node holds; a tensor parallel group never crosses nodes",
            path="parallel.tp",
            value=tp,
            fix=f"use {fits}" if fits > 1 else "use 1, or larger nodes",
        )
    held, wanted = num_groups(room.values(), tp), layout.world_size // tp
    if tp > 1 and held < wanted:
        rest = layout.world_size // layout.dp_shard
        fewer = held * tp // rest * rest
        raise PlanError(
            f"is {wanted} groups of parallel.tp={tp}, and the nodes hold {held} without one that crosses nodes",
            path="cluster.workers",
            value=layout.world_size,
            fix=f"use {fewer}, or add nodes" if fewer else "add nodes",
        )


def _one_kind(layout: Layout, nodes: Iterable[NodeSpec], room: Mapping[str, int]) -> dict[str, str]:
    """The label of the best kind of node that is enough by itself, where there are several.

    All ranks wait for the slowest, and memory is planned for the smallest.
    """
    of_kind: dict[str, list[int]] = {}
    for node in nodes:
        of_kind.setdefault(node.shape, []).append(room[node.id])
    if len(of_kind) < 2:
        return {}
    enough = [name for name, rooms in of_kind.items() if num_groups(rooms, layout.tp) * layout.tp >= layout.world_size]
    shapes = [shape for shape in map(find_shape, enough) if shape is not None]
    best = max(shapes, key=lambda shape: (shape.gpu.bf16_tflops, shape.gpu.memory_bytes), default=None)
    return {SHAPE_LABEL: best.name} if best else {}
