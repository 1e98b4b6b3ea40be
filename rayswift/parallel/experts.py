"""Expert parallelism: each rank of the group holds a share of the experts, and tokens travel to theirs and back.

Ranks of the group read different rows, so that nothing is computed twice (GShard, arXiv 2006.16668). Where the experts
are is read from transformers' expert parallel plan; the module's own forward computes the rank's share.

Shape legend: N tokens of this rank, K experts per token, M token copies received, H hidden, E experts.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from rayswift.parallel.tensor import refuse_adapted_experts

_EXPERTS, _STACKED = "moe_tp_experts", "grouped_gemm"


def spread_experts(model: Any, mesh: DeviceMesh) -> list[nn.Module]:
    """Spread the experts of `model` over `mesh` in place; the modules that hold them, to be sharded on their own.

    Raises PlanError for experts with an adapter.
    """
    plan: dict[str, str] = model._ep_plan
    found = []
    for name, module in list(model.named_modules()):
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        if plan.get(pattern) == _EXPERTS:
            refuse_adapted_experts(module, "ep")
            stacked = {key.rsplit(".", 1)[1] for key, style in plan.items()
                       if style == _STACKED and key.rsplit(".", 1)[0] == pattern}  # fmt: skip
            _spread(module, stacked, mesh)
            found.append(module)
    return found


def _spread(module: nn.Module, stacked: set[str], mesh: DeviceMesh) -> None:
    """Cut the stacked weights [E, ...] of one module, and send its tokens where their experts are."""
    for name in stacked & module._parameters.keys():
        parameter: Any = module._parameters[name]
        local = distribute_tensor(parameter.data, mesh, [Shard(0)], src_data_rank=None)
        module._parameters[name] = nn.Parameter(local, requires_grad=parameter.requires_grad)
        num_local = parameter.shape[0] // mesh.size()
    compute, module.num_experts = module.forward, num_local

    def forward(hidden_NH: torch.Tensor, expert_NK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        return _dispatch(module, compute, hidden_NH, expert_NK, weight_NK, num_local, mesh)

    module.forward = forward


def _dispatch(
    module: nn.Module, compute: Any, hidden_NH: torch.Tensor, expert_NK: torch.Tensor, weight_NK: torch.Tensor,
    num_local: int, mesh: DeviceMesh,
) -> torch.Tensor:  # fmt: skip
    """Each token's experts' outputs, weighted and summed, [N, H]."""
    K = expert_NK.shape[1]
    order = expert_NK.flatten().argsort(stable=True)
    expert, sender = expert_NK.flatten()[order], order // K
    sent = torch.bincount(expert // num_local, minlength=mesh.size())
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=mesh.get_group())
    splits = sent.tolist(), received.tolist()
    hidden_MH = _exchange(hidden_NH[sender], splits[0], splits[1], mesh)
    local_M = _travel((expert % num_local)[:, None], splits[0], splits[1], mesh)[:, 0]
    out_MH = _compute_locally(module, compute, hidden_MH, local_M)
    back = _exchange(out_MH, splits[1], splits[0], mesh)
    weighted = back * weight_NK.flatten()[order][:, None].to(back.dtype)
    return torch.zeros_like(hidden_NH).index_add(0, sender, weighted.to(hidden_NH.dtype))


def _compute_locally(module: nn.Module, compute: Any, hidden_MH: torch.Tensor, local_M: torch.Tensor) -> torch.Tensor:
    """The rank's experts on the copies it received, on plain tensors, with a gradient even where none came."""
    wholes = {name: p for name, p in module.named_parameters(recurse=False) if isinstance(p, DTensor)}
    locals_ = {name: parameter.to_local() for name, parameter in wholes.items()}
    module._parameters.update(locals_)  # type: ignore[arg-type]
    try:
        if len(hidden_MH):
            ones_M1 = torch.ones_like(local_M, dtype=hidden_MH.dtype)[:, None]
            out: torch.Tensor = compute(hidden_MH, local_M[:, None], ones_M1)
        else:
            out = hidden_MH
    finally:
        module._parameters.update(wholes)
    # A rank whose experts got nothing must still take part in reducing their gradients.
    nothing = sum((tensor.flatten()[0] * 0 for tensor in locals_.values()), torch.zeros((), device=out.device))
    return out + nothing.to(out.dtype)


def _travel(x: torch.Tensor, sent: list[int], received: list[int], mesh: DeviceMesh) -> torch.Tensor:
    arrived = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(arrived, x.contiguous(), received, sent, group=mesh.get_group())
    return arrived


def _exchange(x: torch.Tensor, sent: list[int], received: list[int], mesh: DeviceMesh) -> torch.Tensor:
    return _Travel.apply(x, sent, received, mesh)  # type: ignore[no-any-return,no-untyped-call]


class _Travel(torch.autograd.Function):
    """Rows to the ranks in order, `sent[i]` of them to rank i; backward they come home."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sent: list[int], received: list[int], mesh: DeviceMesh) -> torch.Tensor:
        ctx.splits, ctx.mesh = (received, sent), mesh
        return _travel(x, sent, received, mesh)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _travel(grads[0], ctx.splits[0], ctx.splits[1], ctx.mesh), None, None, None
