"""Supervised fine-tuning: the negative log-likelihood of assistant turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from rayswift.config.job import Section

if TYPE_CHECKING:
    import torch

    from rayswift.data.types import PackedBatch


class Sft:
    """-sum(weight * logprob), normalised by the sum of the weights: the mean loss of a trained token."""

    class Config(Section):
        """Supervised fine-tuning has no options yet."""

    needs: ClassVar[frozenset[str]] = frozenset()
    rendering: ClassVar[Literal["text", "chat"]] = "chat"

    def __init__(self, config: Config) -> None:
        self.config = config

    def count(self, batch: PackedBatch) -> torch.Tensor:
        """The sum of the token weights, a float32 scalar."""
        return batch.weights_BT.sum()

    def loss(self, logprobs_BT: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """The weighted negative log-likelihood, summed; a float32 scalar, in nats."""
        return -(logprobs_BT * batch.weights_BT).sum()
