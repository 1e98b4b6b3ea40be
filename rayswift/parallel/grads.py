"""Global gradient norm and clipping, for plain and sharded gradients alike."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float | None) -> float:
    """The 2-norm of all gradients over all ranks, before they are scaled down to `max_norm` in place.

    A norm that is not finite is returned as it is and nothing is scaled. All parameters share one mesh.
    """
    trained = [p for p in parameters if p.grad is not None]
    total = get_total_norm([p.grad for p in trained if p.grad is not None])
    norm = total.full_tensor() if isinstance(total, DTensor) else total
    if max_norm is not None and torch.isfinite(norm):
        clip_grads_with_norm_(trained, max_norm, norm)
    return float(norm)
