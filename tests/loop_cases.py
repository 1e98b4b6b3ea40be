"""An engine for the loop's tests: one process, a real tiny module with dropout, and nothing sharded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from rayswift.data.types import PackedBatch, StepInput
from rayswift.methods import Method
from rayswift.parallel.engine import StepStats
from tests.engine_cases import VOCAB_SIZE, Document, share


class FakeEngine:
    """Next-token prediction from the current token alone; `others` is what the other data ranks add to every sum."""

    supports: ClassVar[frozenset[str]] = frozenset({"float32", "full"})

    def __init__(
        self, *, dropout: float = 0.0, skip: Sequence[bool] = (), data_rank: int = 0, data_size: int = 1
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Embedding(VOCAB_SIZE, 16), nn.Dropout(dropout), nn.Linear(16, VOCAB_SIZE))
        self.data_rank, self.data_size = data_rank, data_size
        self.others: list[list[float]] = []
        self.counts: list[float] = []
        self.rates: list[float] = []
        self._skip = list(skip)

    def forward_backward(self, micro_batches: Sequence[PackedBatch], method: Method, count: float) -> StepStats:
        self.model.train()
        self.counts.append(count)
        total = 0.0
        for batch in micro_batches:
            loss = method.loss(self._logprobs(batch), batch)
            (loss / count).backward()
            total += float(loss.detach())
        return StepStats(loss_sum=total, count=count)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        self.model.eval()
        with torch.no_grad():
            return self._logprobs(batch)

    def optimizer_step(self, stats: StepStats, lr: float) -> StepStats:
        self.rates.append(lr)
        skipped = bool(self._skip and self._skip.pop(0))
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = math.nan if skipped else float(torch.cat([g.flatten() for g in grads]).norm())
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None and not skipped:
                    parameter -= lr * parameter.grad
                parameter.grad = None
        return replace(stats, grad_norm=norm, skipped=skipped)

    def sum_over_data(self, values: Sequence[float]) -> list[float]:
        other = self.others.pop(0) if self.others else [0.0] * len(values)
        return [mine + theirs for mine, theirs in zip(values, other, strict=True)]

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.model.state_dict().items()

    def _logprobs(self, batch: PackedBatch) -> torch.Tensor:
        logprobs = self.model(batch.input_ids_BT).log_softmax(-1)
        return torch.gather(logprobs, 2, batch.targets_BT[..., None])[..., 0]


def step_input(
    rows: Sequence[Document], *, micro_batches: int = 1, position: tuple[int, int] | None = None
) -> StepInput:
    """One rank's share of a step that trains on these documents, unpacked."""
    return StepInput(
        micro_batches=tuple(share(rows, packing=False, micro_batches=micro_batches)),
        num_sequences=len(rows),
        num_tokens=sum(len(row.ids) for row in rows),
        num_rows=len(rows),
        num_rows_visited=len(rows),
        position=position,
    )


def stream(steps: Sequence[StepInput]) -> Iterator[StepInput]:
    """These steps, then empty ones without end, as a rank's real stream gives them."""
    yield from steps
    while True:
        yield step_input([])
