"""Per-token log-probabilities from logits: what a method sees.

Shape legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def token_logprobs(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Log-probability [B, T] of each target in float32, whatever the logits' dtype, in nats."""
    losses = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="none")
    return -losses.view_as(targets_BT)
