"""The device of a rank and the mesh of a layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from rayswift.errors import PlanError
from rayswift.planning.layout import Seat


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


@dataclass(frozen=True)
class Meshes:
    """The ranks of a layout under three views of one mesh, outermost axis first, tp innermost in each."""

    dense: DeviceMesh
    """(pp, dp_replicate, fsdp, tp). Dense parameters are sharded over `fsdp`, which is dp_shard and cp together: ranks
    of a context parallel group hold different tokens, so their gradients are summed like those of data ranks."""
    data: DeviceMesh
    """(pp, dp_replicate, dp_shard, cp, tp): the axes of the layout."""
    sparse: DeviceMesh
    """(pp, dp_replicate, dp_rest, ep, tp). Experts are spread over `ep` and sharded over `dp_rest`."""


def build_meshes(seat: Seat, device: torch.device) -> Meshes:
    """The meshes of a layout over the processes in the order of the seat. Called by all ranks."""
    axes = seat.layout
    world = DeviceMesh(device.type, torch.tensor(seat.order), mesh_dim_names=("world",))
    outer, rest = {"pp": axes.pp, "dp_replicate": axes.dp_replicate}, axes.dp_shard // axes.ep
    return Meshes(
        dense=_view(world, {**outer, "fsdp": axes.dp_shard * axes.cp, "tp": axes.tp}),
        data=_view(world, {**outer, "dp_shard": axes.dp_shard, "cp": axes.cp, "tp": axes.tp}),
        sparse=_view(world, {**outer, "dp_rest": rest * axes.cp, "ep": axes.ep, "tp": axes.tp}),
    )


def _view(world: DeviceMesh, sizes: dict[str, int]) -> DeviceMesh:
    return world._unflatten(0, tuple(sizes.values()), tuple(sizes))
