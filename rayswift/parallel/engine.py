"""The engine seam: forward_backward over micro-batches, then one optimizer step.

Pipeline schedules, DeepSpeed's accumulation boundary and FSDP's no-sync live behind it. The loop knows this
protocol and nothing of any engine; an engine knows nothing of files, Ray or metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from rayswift.config.job import Job
from rayswift.planning.capability import Capability
from rayswift.planning.layout import Seat

if TYPE_CHECKING:
    import torch

    from rayswift.data.types import PackedBatch
    from rayswift.methods import Method


@dataclass(frozen=True)
class StepStats:
    """What an optimizer step did, over all data ranks. The loss of the step is `loss_sum / count`."""

    loss_sum: float
    count: float
    grad_norm: float | None = None
    skipped: bool = False
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The mean loss of what was counted; 0 when nothing was."""
        return self.loss_sum / self.count if self.count else 0.0


class Engine(Protocol):
    """A sharded model with its optimizer. Every method is called by all ranks in the same order."""

    capability: ClassVar[Capability]
    """What it can run; the planner matches it with the job."""
    fills: ClassVar[bool]
    """Whether ranks but the first may give it a model of shapes without values (parameters on the meta device)."""
    data_rank: int
    data_size: int

    def __init__(self, model: Any, job: Job, seat: Seat, device: torch.device) -> None:
        """`model` is a PreTrainedModel, or a PeftModel around one, on the CPU; the engine may take it apart."""
        ...

    def forward_backward(self, micro_batches: Sequence[PackedBatch], method: Method, count: float) -> StepStats:
        """Stats with the loss summed over data ranks; leaves gradients of loss / count on the parameters."""
        ...

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Log-probabilities [B, T] of the targets, float32, without gradients and without dropout."""
        ...

    def optimizer_step(self, stats: StepStats, lr: float) -> StepStats:
        """Clip, check that gradients are finite, step with this learning rate, clear; stats gain the norm."""
        ...

    def sum_over_data(self, values: Sequence[float]) -> list[float]:
        """Each value summed over data ranks, in float64 on the host: exact for counts up to 2**53."""
        ...

    def state(self) -> dict[str, Any]:
        """Sharded model and optimizer state, as torch.distributed.checkpoint saves it."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over a state of the same structure as `state()`."""
        ...

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, full tensor on the CPU) of each trained tensor, one at a time."""
        ...
