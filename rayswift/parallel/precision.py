"""What forward and backward are computed in: dtypes, the loss scale of float16, matrices in FP8."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rayswift.errors import ConfigError

_MULTIPLE_OF = 16  # what the FP8 kernels want of both sizes of a matrix


def compute_dtype(name: str) -> torch.dtype:
    """The torch dtype of activations: with `float8`, what is not a matrix product stays in bfloat16."""
    dtype: torch.dtype = torch.bfloat16 if name == "float8" else getattr(torch, name)
    return dtype


@dataclass
class LossScale:
    """The dynamic scale of float16: halved when a gradient overflows, doubled after `growth_interval` good steps.

    Source: Micikevicius et al., arXiv 1710.03740, section 3.2; the constants are those of torch.amp.GradScaler.
    """

    value: float = 2.0**16
    good_steps: int = 0
    growth_interval: int = 2000

    def update(self, finite: bool) -> None:
        """Take in whether the last step's gradients were finite."""
        if not finite:
            self.value, self.good_steps = max(1.0, self.value / 2), 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.value, self.good_steps = min(2.0**24, self.value * 2), 0

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps."""
        return {"value": torch.tensor(self.value), "good_steps": torch.tensor(self.good_steps)}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state` gave."""
        self.value, self.good_steps = float(state["value"]), int(state["good_steps"])


def use_float8(model: nn.Module, *, emulate: bool = False) -> None:
    """Multiply the matrices of every block in FP8 with dynamic scales (torchao), in place; the head stays as it is.

    `emulate` computes the same on a device without FP8, slowly. Raises ConfigError without torchao.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            "needs torchao, which is not installed",
            path="model.dtype",
            value="float8",
            fix="pip install 'rayswift[fp8]' on every node",
        )
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    head = getattr(model, "get_output_embeddings", lambda: None)()

    def converts(module: nn.Module, _name: str) -> bool:
        sizes: Any = (getattr(module, "in_features", 1), getattr(module, "out_features", 1))
        return module is not head and all(size % _MULTIPLE_OF == 0 for size in sizes)

    convert_to_float8_training(model, config=Float8LinearConfig(emulate=emulate), module_filter_fn=converts)
