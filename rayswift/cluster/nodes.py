"""What the nodes of the connected cluster are: their devices by their labels, what is free, and a picture of it."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray._private.state import available_resources_per_node

from rayswift.planning.hardware import GpuSpec, NodeSpec, find_gpu
from rayswift.planning.node_shapes import ACCELERATOR_LABEL, SHAPE_LABEL, find_shape, gpu_of
from rayswift.planning.placement import Placement, device_resource, room_for

_KNOCK_TIMEOUT_S = 2.0


def living_nodes(device: str) -> tuple[NodeSpec, ...]:
    """The nodes of the cluster, with as many devices of this kind as each has."""
    counted = device_resource(device)
    return tuple(
        NodeSpec(
            id=node["NodeID"],
            num_devices=int(node["Resources"].get(counted, 0)) if counted else 0,
            num_cpus=node["Resources"].get("CPU", 0.0),
            memory_bytes=int(node["Resources"].get("memory", 0)),
            shape=node["Labels"].get(SHAPE_LABEL, ""),
            accelerator_type=node["Labels"].get(ACCELERATOR_LABEL, ""),
        )
        for node in _alive()
    )


def weakest_device(device: str, nodes: Sequence[NodeSpec]) -> tuple[GpuSpec | None, int | None]:
    """(the slowest spec, the least memory) of the devices on these nodes; None for what nobody knows."""
    here = next((node for node in nodes if node.id == ray.get_runtime_context().get_node_id()), None)
    local = _local_device(device) if here is not None and here.num_devices and not find_shape(here.shape) else None
    found: list[tuple[GpuSpec | None, int | None]] = []
    for node in nodes:
        if node.num_devices:
            mine = here is not None and node.accelerator_type in ("", here.accelerator_type)
            found.append(_device_of(node, local if mine else None))
    specs = [gpu for gpu, _ in found]
    known = [gpu for gpu in specs if gpu is not None]
    slowest = (
        min(known, key=lambda gpu: (gpu.bf16_tflops, gpu.memory_bytes)) if known and len(known) == len(specs) else None
    )
    return slowest, min((size for _, size in found if size), default=None)


def _device_of(node: NodeSpec, local: tuple[GpuSpec | None, int] | None) -> tuple[GpuSpec | None, int | None]:
    """(spec, bytes) of a node's devices: by its shape, else as torch sees those of the driver's machine, else by type.

    The type that Ray finds by itself leaves the memory open. A driver on a head without GPUs has only the labels.
    """
    gpu = gpu_of(node)
    if local is not None and not find_shape(node.shape):
        return local
    return gpu, gpu.memory_bytes if gpu else None


def _local_device(device: str) -> tuple[GpuSpec | None, int] | None:
    """(spec, bytes) of a device of this machine as torch finds it; None when it finds none."""
    import torch

    if not torch.accelerator.is_available():
        return None
    properties = getattr(torch, device).get_device_properties(0)
    return find_gpu(str(properties.name), int(properties.total_memory)), int(properties.total_memory)


def room_on_nodes(placement: Placement) -> dict[str, int]:
    """Node -> how many more workers fit there now; without nodes that do not answer, which Ray notices late."""
    free = available_resources_per_node()
    return {
        node["NodeID"]: room_for(free.get(node["NodeID"], {}), placement.resources_per_worker)
        for node in _alive()
        if _is_selected(node, placement) and _answers(node)
    }


def picture(placement: Placement, ranks: Mapping[str, Sequence[int]] | None = None) -> str:
    """A table with a line per node: its shape, the ranks that sit there or how many workers would fit, what is free."""
    need, free = placement.resources_per_worker, available_resources_per_node()
    lines = [("node", "shape", "fits" if ranks is None else "ranks", "free")]
    for node in _alive():
        name, resources = node["NodeID"], node["Resources"]
        left = free.get(name, {})
        fits = room_for(left, need) if _is_selected(node, placement) else 0
        lines.append((
            name[:8],
            node["Labels"].get(SHAPE_LABEL) or node["Labels"].get(ACCELERATOR_LABEL) or "-",
            str(fits) if ranks is None else " ".join(map(str, ranks.get(name, ()))) or "-",
            ", ".join(f"{kind} {left.get(kind, 0):g} of {resources.get(kind, 0):g}" for kind in need),
        ))  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join("  ".join([*map(str.ljust, line, widths), line[3]]) for line in lines)


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _is_selected(node: Mapping[str, Any], placement: Placement) -> bool:
    return all(node["Labels"].get(label) == value for label, value in placement.label_selector.items())


def _answers(node: Mapping[str, Any]) -> bool:
    try:
        address = (node["NodeManagerAddress"], node["NodeManagerPort"])
        socket.create_connection(address, timeout=_KNOCK_TIMEOUT_S).close()
    except OSError:
        return False
    return True
