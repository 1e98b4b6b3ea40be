"""Training methods, one module each: `Config`, `needs`, `rendering`, `count(batch)` and `loss(logprobs, batch)`.

A loss is a SUM over this rank's tokens or pairs; `count` is what normalises it, summed over all ranks by the
loop. A method sees per-token log-probabilities, never sharded logits. Modules here import torch for typing
only, so that a driver can read a method's Config without loading torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from pydantic import BaseModel

    from rayswift.data.types import PackedBatch


class Loss(Protocol):
    """What measuring asks of a method."""

    def count(self, batch: PackedBatch) -> torch.Tensor:
        """What `loss` is divided by, as a scalar: the sum of the weights of this micro-batch."""
        ...

    def loss(self, logprobs_BT: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """The SUM of the loss over this micro-batch, as a scalar in float32."""
        ...


class Method(Loss, Protocol):
    """What the loop and the engines ask of a method."""

    Config: ClassVar[type[BaseModel]]
    needs: ClassVar[frozenset[str]]
    """What an engine must support beside plain log-probabilities: `reference`, `rollout`, `scalar_head`."""
    rendering: ClassVar[Literal["text", "chat"]]
    """How rows become tokens: plain text trained everywhere, or conversations trained on assistant turns."""
