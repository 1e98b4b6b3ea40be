"""The optimizer over trained parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rayswift.config.job import TrainSpec


def build_optimizer(model: nn.Module, train: TrainSpec) -> torch.optim.Optimizer:
    """AdamW or SGD over the parameters that require gradients; weight decay on matrices only.

    Call it AFTER sharding: an optimizer built before holds the unsharded tensors and silently trains nothing.
    """
    kinds: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        kinds.setdefault((parameter.ndim >= 2, mesh), []).append(parameter)  # one kernel call takes one mesh only
    groups = [
        {"params": parameters, "weight_decay": train.weight_decay if is_matrix else 0.0}
        for (is_matrix, _), parameters in sorted(kinds.items(), key=lambda kind: not kind[0][0])
    ]
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum)
    return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, fused=True)
