"""FSDP2 on a mesh: one process, DDP, FSDP, HSDP, tensor, context and expert parallel, told apart by the mesh alone.

Knows how a model is spread and stepped; knows nothing of files, Ray or metrics. The module loads torch inside the
class, so that a driver can read `capability` without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rayswift.config.job import Job
from rayswift.parallel.engine import StepStats
from rayswift.planning.capability import CUTTING, Capability, Conflict
from rayswift.planning.layout import Seat

if TYPE_CHECKING:
    import torch

    from rayswift.data.types import PackedBatch
    from rayswift.methods import Method


class Fsdp2:
    """A Hugging Face model under FSDP2, or plain on a world of one, where sharding would only copy."""

    fills: ClassVar[bool] = True
    capability: ClassVar[Capability] = Capability(
        supports=frozenset(
            {
                *("dp_replicate", "dp_shard", "cp", "tp", "ep"),
                *("float32", "bfloat16", "float16", "float8"),
                *("full", "lora", "nf4", "offload_parameters"),
            }
        ),
        conflicts=(
            *CUTTING,
            Conflict(
                frozenset({"float8", "tp"}),
                "the FP8 layers of torchao replace the ones that the tensor parallel plan names",
                "use parallel.dp_shard instead of parallel.tp, or model.dtype=bfloat16",
            ),
            Conflict(
                frozenset({"float8", "lora"}),
                "an adapter's layers are too small for FP8 and its base is not trained",
                "use model.dtype=bfloat16",
            ),
        ),
    )

    def __init__(self, model: Any, job: Job, seat: Seat, device: torch.device) -> None:
        """See `Engine`. Spread what is computed, shard what is kept, then build the optimizer."""
        import torch

        from rayswift.parallel import filling, mesh, precision, sharding, tensor
        from rayswift.parallel.trained import HostSum, Trained

        self._torch, self._device = torch, device
        self._dtype = precision.compute_dtype(job.model.dtype)
        self.data_rank, self.data_size = seat.data_rank, seat.data_size
        self._sharded = seat.layout.world_size > 1
        self._vocabulary = self._context = None
        if self._sharded:
            meshes = mesh.build_meshes(seat, device)
            filler = filling.Filler(model, sharding.receiving_device(job, device))
            found = sharding.spread(model, job, meshes)
            plan = sharding.Sharding.of(meshes, job, device)
            sharding.shard(model, sharding.units_of(model, plan, found.experts), filler)
            self._vocabulary = tensor.vocabulary_of(model)
            self._context = meshes.data["cp"] if seat.layout.cp > 1 else None
            self._trained = Trained(model, job, partial=found.partial, tp=meshes.dense["tp"])
        else:
            sharding.adapt(model, job)
            self._trained = Trained(model.to(device), job)
        self._model = model
        self._host_sum = HostSum(seat)

    def forward_backward(self, micro_batches: Sequence[PackedBatch], method: Method, count: float) -> StepStats:
        """See `Engine`. Gradients are reduced once, in the backward pass of the last micro-batch."""
        from rayswift.parallel.forward import to_device
        from rayswift.parallel.sharding import sync_gradients

        self._model.train()
        loss_sum = self._torch.zeros((), device=self._device)
        factor = self._trained.loss_scale / max(count, 1e-12)
        for index, batch in enumerate(micro_batches):
            sync_gradients(self._model, index == len(micro_batches) - 1)
            loss = method.loss(self._logprobs(batch), to_device(batch, self._device))
            (loss * factor).backward()
            loss_sum += loss.detach()
        return StepStats(loss_sum=self.sum_over_data([float(loss_sum)])[0], count=count)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """See `Engine`."""
        self._model.eval()
        with self._torch.no_grad():
            return self._logprobs(batch)

    def optimizer_step(self, stats: StepStats, lr: float) -> StepStats:
        """See `Engine`."""
        return self._trained.step(stats, lr)

    def sum_over_data(self, values: Sequence[float]) -> list[float]:
        """See `Engine`."""
        return self._host_sum(values)

    def state(self) -> dict[str, Any]:
        """See `Engine`."""
        return self._trained.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `Engine`."""
        self._trained.load_state(state)

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Engine`."""
        return self._trained.weights()

    def _logprobs(self, batch: PackedBatch) -> torch.Tensor:
        """Log-probabilities [B, T]. Without FSDP, which casts parameters, autocast chooses the precision."""
        from rayswift.parallel.forward import batch_logprobs, to_device

        batch = to_device(batch, self._device)
        mixed = self._dtype != self._torch.float32 and not self._sharded
        with self._torch.autocast(self._device.type, dtype=self._dtype, enabled=mixed):
            return batch_logprobs(self._model, batch, vocabulary=self._vocabulary, context=self._context)
