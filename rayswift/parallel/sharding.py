"""Spreads a Hugging Face model over the meshes of a layout. Knows where its blocks are, not what they compute.

The order of application: `spread` (tensor parallel, experts, context, precision, recompute), then `shard`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard

from rayswift.config.job import Job
from rayswift.parallel.context import use_ulysses
from rayswift.parallel.experts import spread_experts
from rayswift.parallel.filling import Filler, Unit
from rayswift.parallel.mesh import Meshes
from rayswift.parallel.precision import compute_dtype, use_float8
from rayswift.parallel.tensor import apply_tensor_parallel, unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sharding:
    """What FSDP needs to know of a layout: which meshes, which precision, where parameters lie."""

    mesh: DeviceMesh
    """(dp_replicate, fsdp), for dense parameters."""
    expert_mesh: DeviceMesh
    """(dp_replicate, dp_rest), for experts that are spread over `ep`."""
    dtype: torch.dtype
    offload: OffloadPolicy
    reshard_after_forward: bool = True

    @classmethod
    def of(cls, meshes: Meshes, job: Job, device: torch.device, *, reshard_after_forward: bool = True) -> Sharding:
        """The sharding a job asks for."""
        offload = CPUOffloadPolicy(pin_memory=device.type != "cpu")
        return cls(
            mesh=meshes.dense["dp_replicate", "fsdp"],
            expert_mesh=meshes.sparse["dp_replicate", "dp_rest"],
            dtype=compute_dtype(job.model.dtype),
            offload=offload if job.parallel.offload == "parameters" else OffloadPolicy(),
            reshard_after_forward=reshard_after_forward,
        )


@dataclass(frozen=True)
class Spread:
    """What of a parallelized model needs care later."""

    experts: list[nn.Module]
    """Modules whose parameters are spread over `ep`."""
    partial: list[nn.Module]
    """Modules whose gradients are to be summed over `tp` before the step."""


def spread(model: nn.Module, job: Job, meshes: Meshes) -> Spread:
    """Everything that changes what a block computes on this rank, before it is sharded."""
    tp, ep, cp = meshes.dense["tp"], meshes.sparse["ep"], meshes.data["cp"]
    in_part = apply_tensor_parallel(model, tp, skip=".experts" if ep.size() > 1 else None) if tp.size() > 1 else []
    experts = spread_experts(unwrapped(model), ep) if ep.size() > 1 else []
    if cp.size() > 1:
        use_ulysses(unwrapped(model))
    adapt(model, job)
    return Spread(experts, in_part)


def adapt(model: nn.Module, job: Job) -> None:
    """What a single process needs, too: matrices in FP8, blocks that are recomputed."""
    if job.model.dtype == "float8":
        use_float8(model)
    if job.model.activation_checkpointing:
        recompute_blocks(cast(Any, model))


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks, outermost only: the classes transformers names, else the longest ModuleList's items."""
    names = {name for m in model.modules() for name in (getattr(m, "_no_split_modules", None) or ())}
    blocks = [m for m in model.modules() if type(m).__name__ in names]
    if not blocks:
        lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
        blocks = max(lists, key=len, default=[])
    inner = {id(child) for block in blocks for child in block.modules() if child is not block}
    return [block for block in blocks if id(block) not in inner]


def recompute_blocks(model: PreTrainedModel) -> None:
    """Recompute each block in the backward pass. Adapters need the inputs of frozen blocks to carry gradients."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def shard(model: nn.Module, units: Sequence[Unit], filler: Filler) -> None:
    """Fill and shard the units of `model` with FSDP2, in place.

    Gradients are SUMMED over ranks, because losses are sums divided by a global count: gloo lacks the
    pre-multiplied sum that a divide factor of 1 asks for, hence the forced plain sum.
    """
    # The logits of a spread head are a view of their DTensor; they are only read.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    filler.fill(model, units)


def units_of(
    model: nn.Module, sharding: Sharding, experts: Sequence[nn.Module] = (), *, casts_output: bool = True
) -> list[Unit]:
    """What is sharded as one: experts, every block, and the rest.

    Only the root casts its output to float32 (`casts_output`); a block or a stage that did would feed float32 into the
    next one.
    """
    own = set(map(id, model.modules()))
    mine = [module for module in experts if id(module) in own]
    return [
        *(Unit(module, partial(_shard_one, module, sharding, mesh=sharding.expert_mesh)) for module in mine),
        *(Unit(block, partial(_shard_one, block, sharding)) for block in find_blocks(model)),
        Unit(model, partial(_shard_one, model, sharding, casts_output=casts_output)),
    ]


def _shard_one(
    module: nn.Module, sharding: Sharding, *, mesh: DeviceMesh | None = None, casts_output: bool = False
) -> None:
    mixed = sharding.dtype != torch.float32
    policy = MixedPrecisionPolicy(
        param_dtype=sharding.dtype if mixed else None,
        reduce_dtype=torch.float32 if mixed else None,
        output_dtype=torch.float32 if mixed and casts_output else None,
    )
    mesh = mesh or sharding.mesh
    ways = mesh.size(1)
    fully_shard(
        module,
        mesh=mesh,
        mp_policy=policy,
        offload_policy=sharding.offload,
        reshard_after_forward=sharding.reshard_after_forward,
        shard_placement_fn=lambda parameter: _placement(parameter, ways),
    )
    sharded = cast(FSDPModule, module)
    sharded.set_force_sum_reduction_for_comms(True)
    sharded.set_gradient_divide_factor(1.0)


def _placement(parameter: nn.Parameter, ways: int) -> Shard | None:
    """Beside a first dim that tensor or expert parallelism has cut, FSDP cuts the second one where it is even.

    Two cuts of one dim would be strided shards, which not every part of torch can read.
    """
    if not isinstance(parameter, DTensor) or parameter.ndim < 2:
        return None
    cut = {place.dim for place in parameter.placements if not place.is_replicate()}  # type: ignore[attr-defined]
    return Shard(1) if 0 in cut and 1 not in cut and parameter.shape[1] % ways == 0 else None


def receiving_device(job: Job, device: torch.device) -> torch.device:
    """Where weights arrive before they are sharded: FSDP wants those on the host that it keeps there."""
    return torch.device("cpu") if job.parallel.offload == "parameters" else device


def sync_gradients(model: nn.Module, enabled: bool) -> None:
    """Reduce gradients in the next backward pass, or keep them for the next micro-batch."""
    if isinstance(model, FSDPModule):
        cast(FSDPModule, model).set_requires_gradient_sync(enabled)


def reshard(model: nn.Module) -> None:
    """Give back what a forward pass without a backward one has gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
