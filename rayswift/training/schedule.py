"""The learning rate as a pure function of progress."""

from __future__ import annotations

import math

from rayswift.config.job import TrainSpec


def learning_rate(train: TrainSpec, step: int, progress: float) -> float:
    """The rate of optimizer step `step` (from 1) when the fraction `progress` of the run lies behind it.

    Progress is counted in rows (or steps, under `max_steps`), because with packing nobody knows the number
    of steps before the last row is tokenized; it does not depend on the layout.
    """
    warmup = min(1.0, step / (train.warmup_steps + 1)) if train.warmup_steps else 1.0
    match train.schedule:
        case "cosine":
            shape = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        case "linear":
            shape = max(0.0, 1 - progress)
        case "constant":
            shape = 1.0
    return train.lr * warmup * (train.min_lr_ratio + (1 - train.min_lr_ratio) * shape)
