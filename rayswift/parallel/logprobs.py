"""Per-token log-probabilities from logits: what a method sees.

Shape legend: B sequences, T tokens, V vocabulary, v this rank's share of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Vocabulary:
    """The columns of the logits that a rank has, from `start` on. The ranks of `mesh` have all of them."""

    mesh: DeviceMesh
    start: int


def token_logprobs(
    logits_BTV: torch.Tensor, targets_BT: torch.Tensor, vocabulary: Vocabulary | None = None
) -> torch.Tensor:
    """Log-probability [B, T] of each target in float32, whatever the logits' dtype, in nats.

    With a `vocabulary` the logits are this rank's columns only; the result is the same on every rank that has some.
    """
    if vocabulary is not None and vocabulary.mesh.size() > 1:
        return _SpreadLogprobs.apply(logits_BTV, targets_BT, vocabulary)  # type: ignore[no-any-return,no-untyped-call]
    losses = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="none")
    return -losses.view_as(targets_BT)


class _SpreadLogprobs(torch.autograd.Function):
    """Log-softmax over a vocabulary that is cut over ranks: two small all-reduces, never a whole row of logits.

    Source: Megatron-LM, arXiv 1909.08053, section 3.
    """

    @staticmethod
    def forward(ctx: Any, logits_BTv: torch.Tensor, targets_BT: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
        group, logits = vocabulary.mesh.get_group(), logits_BTv.float()
        local = targets_BT - vocabulary.start
        mine = (local >= 0) & (local < logits.shape[-1])
        local = local.masked_fill(~mine, 0)
        largest = logits.amax(-1)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        shifted = logits - largest[..., None]
        picked = torch.stack([shifted.gather(-1, local[..., None])[..., 0] * mine, shifted.exp().sum(-1)])
        dist.all_reduce(picked, group=group)
        ctx.save_for_backward(shifted, picked[1], local, mine)
        ctx.dtype = logits_BTv.dtype
        return picked[0] - picked[1].log()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad_BT,) = grads
        shifted, total, local, mine = ctx.saved_tensors
        grad_BTv = shifted.exp() / total[..., None] * -grad_BT[..., None]
        grad_BTv.scatter_add_(-1, local[..., None], (grad_BT * mine)[..., None])
        return grad_BTv.to(ctx.dtype), None, None
