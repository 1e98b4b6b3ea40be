"""Global gradient norm and clipping, for gradients on any mixture of meshes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


def clip_gradients(
    parameters: Iterable[torch.nn.Parameter],
    max_norm: float | None,
    *,
    scale: float = 1.0,
    stages: dist.ProcessGroup | None = None,
    counted_elsewhere: Sequence[torch.nn.Parameter] = (),
) -> float:
    """The 2-norm of all gradients over all ranks, before they are scaled down to `max_norm` in place.

    Gradients are divided by `scale`, that of the loss, on the way. `stages` is the pipeline's group: its ranks hold
    different parameters, but for those `counted_elsewhere`, which another stage has too. A norm that is not finite is
    returned as it is and nothing is changed. Any layout of the same gradients gives the same norm.
    """
    grads = [(p.grad, any(p is other for other in counted_elsewhere)) for p in parameters if p.grad is not None]
    total = _sum_of_squares([grad for grad, elsewhere in grads if not elsewhere])
    if stages is not None:
        total = total.to(_device_of([grad for grad, _ in grads], total.device))
        dist.all_reduce(total, group=stages)
    norm = float(total.sqrt()) / scale
    limit = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
    if torch.isfinite(total) and limit / scale != 1.0:
        torch._foreach_mul_([_local(grad) for grad, _ in grads], limit / scale)
    return norm


def _local(grad: torch.Tensor) -> torch.Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _device_of(grads: Sequence[torch.Tensor], default: torch.device) -> torch.device:
    return grads[0].device if grads else default


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which Apple's GPUs have not


def _sum_of_squares(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum over all elements of all gradients, in float64: shards are summed, copies counted once."""
    by_group: dict[tuple[dist.ProcessGroup, ...], list[torch.Tensor]] = {}
    for grad in grads:
        by_group.setdefault(_shard_groups(grad), []).append(_local(grad))
    device = _device_of(grads, torch.device("cpu"))
    total = torch.zeros((), dtype=_exact(device), device=device)
    for groups, locals_ in by_group.items():
        part = torch.stack(torch._foreach_norm(locals_, 2, dtype=_exact(total.device))).square().sum()
        for group in groups:
            dist.all_reduce(part, group=group)
        total = total + part
    return total


def _shard_groups(grad: torch.Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The process groups whose ranks hold different parts of a gradient. A strided shard is no `is_shard` to torch."""
    if not isinstance(grad, DTensor):
        return ()
    mesh = grad.device_mesh
    assert not any(place.is_partial() for place in grad.placements), "a gradient was not reduced"
    return tuple(
        mesh.get_group(axis)
        for axis, place in enumerate(grad.placements)
        if not place.is_replicate() and mesh.size(axis) > 1
    )
