"""The optimizer over trained parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rayswift.config.job import TrainSpec
from rayswift.planning.parts import part_of

LR_SCALE = "lr_scale"
"""The key of a parameter group under which its share of the learning rate is kept (`train.lr_groups`)."""


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """The learning rate of a step, in each group its share of it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group[LR_SCALE]


def build_optimizer(model: nn.Module, train: TrainSpec) -> torch.optim.Optimizer:
    """AdamW or SGD over the parameters that require gradients; weight decay on matrices only.

    Call it AFTER sharding: an optimizer built before holds the unsharded tensors and silently trains nothing.
    """
    kinds: dict[tuple[bool, float, Any], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None  # a kernel call takes one mesh
            scale = train.lr_groups.get(part_of(name), train.lr) / train.lr
            kinds.setdefault((parameter.ndim >= 2, scale, mesh), []).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": train.weight_decay if is_matrix else 0.0, LR_SCALE: scale}
        for (is_matrix, scale, _), parameters in sorted(kinds.items(), key=lambda kind: (not kind[0][0], kind[0][1]))
    ]
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum)
    return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, fused=True)
