"""Wraps a Hugging Face model's blocks with FSDP2. Knows where blocks are, not what they compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


def shard(model: nn.Module, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Shard every block and the rest over the last axis of `mesh`, replicated over the first.

    Gradients are SUMMED over ranks, because losses are sums divided by a global count: gloo lacks the
    pre-multiplied sum that a divide factor of 1 asks for, hence the forced plain sum. Only the root casts its
    output to float32; a block that did would feed float32 into the next one.
    """
    mixed = compute_dtype != torch.float32
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32) if mixed else None
    root_policy = (
        MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
        if mixed
        else None
    )
    for block in find_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())
    fully_shard(model, mesh=mesh, mp_policy=root_policy or MixedPrecisionPolicy())
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def sync_gradients(model: nn.Module, enabled: bool) -> None:
    """Reduce gradients in the next backward pass, or keep them for the next micro-batch."""
    if isinstance(model, FSDPModule):
        cast(FSDPModule, model).set_requires_gradient_sync(enabled)
