"""The optimizer over trained parameters."""

from __future__ import annotations

import torch
from torch import nn

from rayswift.config.job import TrainSpec


def build_optimizer(model: nn.Module, train: TrainSpec) -> torch.optim.Optimizer:
    """AdamW or SGD over the parameters that require gradients; weight decay on matrices only.

    Call it AFTER sharding: an optimizer built before holds the unsharded tensors and silently trains nothing.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum)
    return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, fused=True)
