"""The device of a rank and the mesh of a layout."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rayswift.errors import PlanError
from rayswift.planning.layout import Layout


def find_device(kind: str, local_rank: int = 0) -> torch.device:
    """The device a rank computes on: `auto` takes what torch.accelerator finds, else the CPU.

    Raises PlanError when a named kind is not there.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind == "auto":
        kind = found.type if found is not None else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    if found is None or found.type != kind:
        raise PlanError(
            f"is not available here; torch finds {found.type if found else 'no accelerator'}",
            path="cluster.device",
            value=kind,
            fix="use cluster.device=auto or cpu",
        )
    index = local_rank % torch.accelerator.device_count()
    torch.accelerator.set_device_index(index)
    return torch.device(kind, index)


def collective_backend(device_type: str) -> str:
    """The process group backend: gloo for the host and, beside it, what the device communicates with.

    By name, because a driver on a head node has none of these devices.
    """
    native = {"cuda": "nccl", "npu": "hccl", "xpu": "xccl"}.get(device_type)
    return f"cpu:gloo,{device_type}:{native}" if native else "gloo"


def data_mesh(layout: Layout, device: torch.device) -> DeviceMesh:
    """The (dp_replicate, dp_shard) mesh that FSDP2 shards and replicates over."""
    return init_device_mesh(
        device.type, (layout.dp_replicate, layout.dp_shard), mesh_dim_names=("dp_replicate", "dp_shard")
    )
