"""The trained parameters of a rank with their optimizer: one step, and the state that checkpoints keep.

Shared by the engines that hold torch parameters, whatever meshes these are spread over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from rayswift.config.job import Job
from rayswift.parallel.engine import StepStats
from rayswift.parallel.grads import clip_gradients
from rayswift.parallel.optim import build_optimizer, set_learning_rate
from rayswift.parallel.precision import LossScale
from rayswift.parallel.state import engine_state, load_engine_state
from rayswift.parallel.tensor import check_agreement, sum_partial_gradients
from rayswift.parallel.tie import Tie
from rayswift.planning.layout import Seat


class Trained:
    """What is trained on this rank. Build it after sharding: the optimizer holds the sharded tensors."""

    def __init__(
        self,
        model: nn.Module,
        job: Job,
        *,
        partial: Sequence[nn.Module] = (),
        tp: DeviceMesh | None = None,
        stages: dist.ProcessGroup | None = None,
        tie: Tie | None = None,
    ) -> None:
        """`partial` are modules whose gradients are summed over `tp`; `stages` is the pipeline's group."""
        self._model, self._max_norm, self._full = model, job.train.max_grad_norm, job.adapter is None
        self._partial, self._tp, self._stages = partial, tp, stages
        self._tie = tie
        self._agrees = tp is None or tp.size() == 1
        self._optimizer = build_optimizer(model, job.train)
        self._scale = LossScale() if job.model.dtype == "float16" else None

    @property
    def loss_scale(self) -> float:
        """What a loss is multiplied with before its backward pass."""
        return self._scale.value if self._scale else 1.0

    def step(self, stats: StepStats, lr: float) -> StepStats:
        """Clip, check that gradients are finite, step, clear. A step that is not finite is skipped, never applied."""
        if self._tp is not None:
            sum_partial_gradients(self._partial, self._tp)
            self._agrees = self._agrees or check_agreement(self._model, self._tp)
        if self._tie is not None:
            self._tie.sum_gradients()
        scale = self.loss_scale
        norm = clip_gradients(
            self._model.parameters(),
            self._max_norm,
            scale=scale,
            stages=self._stages,
            counted_elsewhere=() if self._tie is None else self._tie.second,
        )
        finite = math.isfinite(norm)
        if finite:
            set_learning_rate(self._optimizer, lr)
            self._optimizer.step()
        self._optimizer.zero_grad()
        metrics = dict(stats.metrics)
        if self._scale is not None:
            metrics["loss_scale"] = scale
            self._scale.update(finite)
        return replace(stats, grad_norm=norm, skipped=not finite, metrics=metrics)

    def state(self) -> dict[str, Any]:
        """Keys `model` and `optim`, of trained parameters only, and with float16 `scale`."""
        state = engine_state(self._model, self._optimizer, full=self._full)
        if self._tie is not None:
            state["optim"] = self._tie.joined(state["optim"])
        return state | ({"scale": self._scale.state()} if self._scale else {})

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over a state of the structure of `state`."""
        optim = state["optim"]
        if self._tie is not None:
            own = engine_state(self._model, self._optimizer, full=self._full)["optim"]
            optim = self._tie.parted(optim, own)
        load_engine_state(self._model, self._optimizer, {"model": state["model"], "optim": optim}, full=self._full)
        if self._scale is not None:
            self._scale.load(state["scale"])

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole tensor on the CPU) of each trained tensor of this rank's part of the model, one at a time."""
        for name, tensor in engine_state(self._model, self._optimizer, full=self._full)["model"].items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            yield name, whole.detach().cpu()


class HostSum:
    """Sums numbers over data ranks in float64 on the host, so that counting never waits for a device."""

    def __init__(self, seat: Seat) -> None:
        """Called by all ranks. Of those that read the same rows one speaks for all."""
        self._leads = seat.data_leader(seat.data_rank) == seat.rank
        self._group = dist.new_group(backend="gloo") if seat.layout.world_size > 1 else None

    def __call__(self, values: Sequence[float]) -> list[float]:
        """Each value summed."""
        totals = torch.tensor(list(values), dtype=torch.float64) * self._leads
        if self._group is not None:
            dist.all_reduce(totals, group=self._group)
        return [float(total) for total in totals.tolist()]
