"""FSDP2: one process, DDP (dp_shard=1), FSDP and HSDP, told apart by the mesh alone.

Knows how a model is recomputed, sharded and stepped; knows nothing of files, Ray or metrics. The module loads
torch inside the class, so that a driver can read `supports` without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rayswift.config.job import Job
from rayswift.parallel.engine import StepStats
from rayswift.planning.capability import Capability
from rayswift.planning.layout import Seat

if TYPE_CHECKING:
    import torch

    from rayswift.data.types import PackedBatch
    from rayswift.methods import Method


class Fsdp2:
    """A Hugging Face model under FSDP2, or plain on a world of one, where sharding would only copy."""

    capability: ClassVar[Capability] = Capability(
        frozenset({"dp_replicate", "dp_shard", "float32", "bfloat16", "full", "lora"})
    )

    def __init__(self, model: Any, job: Job, seat: Seat, device: torch.device) -> None:
        """See `Engine`. Recompute, then shard, then the optimizer."""
        import torch

        from rayswift.parallel import mesh, optim, sharding

        self._torch, self._device, self._train = torch, device, job.train
        self._full = job.adapter is None
        self._dtype = getattr(torch, job.model.dtype)
        self.data_rank, self.data_size = seat.data_rank, seat.data_size
        self._sharded = seat.layout.world_size > 1
        if job.model.activation_checkpointing:
            sharding.recompute_blocks(model)
        if self._sharded:
            sharding.shard(model, mesh.build_meshes(seat, device).dense["dp_replicate", "fsdp"], self._dtype)
        self._model = model.to(device) if not self._sharded else model
        self._optimizer = optim.build_optimizer(self._model, job.train)
        self._host_group = self._new_host_group()

    def forward_backward(self, micro_batches: Sequence[PackedBatch], method: Method, count: float) -> StepStats:
        """See `Engine`. Gradients are reduced once, in the backward pass of the last micro-batch."""
        from rayswift.parallel.sharding import sync_gradients

        self._model.train()
        loss_sum = self._torch.zeros((), device=self._device)
        for index, batch in enumerate(micro_batches):
            sync_gradients(self._model, index == len(micro_batches) - 1)
            loss = method.loss(self._logprobs(batch), self._to_device(batch))
            (loss / max(count, 1e-12)).backward()
            loss_sum += loss.detach()
        return StepStats(loss_sum=self.sum_over_data([float(loss_sum)])[0], count=count)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """See `Engine`."""
        self._model.eval()
        with self._torch.no_grad():
            return self._logprobs(batch)

    def optimizer_step(self, stats: StepStats, lr: float) -> StepStats:
        """See `Engine`. A step whose gradients are not finite is skipped and counted, never applied."""
        from dataclasses import replace

        from rayswift.parallel.grads import clip_gradients

        norm = clip_gradients(self._model.parameters(), self._train.max_grad_norm)
        finite = math.isfinite(norm)
        if finite:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._optimizer.zero_grad()
        return replace(stats, grad_norm=norm, skipped=not finite)

    def sum_over_data(self, values: Sequence[float]) -> list[float]:
        """See `Engine`. Runs over a host group, so that counting never waits for the device."""
        totals = self._torch.tensor(list(values), dtype=self._torch.float64)
        if self.data_size > 1:
            self._torch.distributed.all_reduce(totals, group=self._host_group)
        return [float(total) for total in totals.tolist()]

    def state(self) -> dict[str, Any]:
        """See `Engine`: keys `model` and `optim`, frozen parameters of an adapter run left out."""
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optim = get_state_dict(self._model, self._optimizer, options=self._state_options())
        if not self._full:  # a frozen head tied to the embedding comes along under its second name
            trained = {n for n, p in self._model.named_parameters(remove_duplicate=False) if p.requires_grad}
            model = {name: tensor for name, tensor in model.items() if name in trained}
        return {"model": model, "optim": optim}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `Engine`."""
        from torch.distributed.checkpoint.state_dict import set_state_dict

        set_state_dict(
            self._model,
            self._optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optim"],
            options=self._state_options(),
        )

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Engine`."""
        from torch.distributed.tensor import DTensor

        for name, tensor in self.state()["model"].items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            yield name, full.detach().cpu()

    def _logprobs(self, batch: PackedBatch) -> torch.Tensor:
        """Log-probabilities [B, T]. No attention mask and no cache: with either, packed documents leak silently."""
        from rayswift.parallel.logprobs import token_logprobs

        batch = self._to_device(batch)
        mixed = self._dtype != self._torch.float32 and not self._sharded
        with self._torch.autocast(self._device.type, dtype=self._dtype, enabled=mixed):
            logits_BTV = self._model(
                input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False
            ).logits
        return token_logprobs(logits_BTV, batch.targets_BT)

    def _to_device(self, batch: PackedBatch) -> PackedBatch:
        if self._device.type == "cpu":
            return batch
        from dataclasses import fields

        return type(batch)(
            **{f.name: getattr(batch, f.name).to(self._device, non_blocking=True) for f in fields(batch)}
        )

    def _state_options(self) -> Any:
        from torch.distributed.checkpoint.state_dict import StateDictOptions

        return StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True, strict=self._full)

    def _new_host_group(self) -> Any:
        return self._torch.distributed.new_group(backend="gloo") if self.data_size > 1 else None
