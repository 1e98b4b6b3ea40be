"""DeepSpeed's ZeRO 1 to 3 over all data ranks, with offload to the host and to NVMe, and the user's own JSON.

Knows how DeepSpeed's averages and accumulation become our sums, and where its settings come from. Its parts:
`config/deepspeed_json.py` (settings), `zero_state.py` (checkpoints), `deepspeed_ops.py` (compiled extensions).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rayswift.config.job import Job
from rayswift.parallel.engine import StepStats
from rayswift.planning.capability import Capability, Conflict
from rayswift.planning.layout import Seat

if TYPE_CHECKING:
    import torch

    from rayswift.data.types import PackedBatch
    from rayswift.methods import Method


class Deepspeed:
    """A Hugging Face model under ZeRO. Weights and optimizer state are float32 whatever is computed in."""

    fills: ClassVar[bool] = False
    capability: ClassVar[Capability] = Capability(
        supports=frozenset(
            {
                *("dp_shard", "dp_replicate", "float32", "bfloat16", "float16", "full", "lora"),
                *("offload_optimizer", "offload_parameters", "offload_nvme", "zero_stage"),
            }
        ),
        conflicts=(
            Conflict(
                frozenset({"dp_replicate"}),
                "ZeRO spreads the model over every data rank and keeps no copies beside each other",
                "use parallel.dp_shard for all of them, or parallel.engine=fsdp2",
            ),
        ),
        preference=20,
        requires="deepspeed",
    )

    def __init__(self, model: Any, job: Job, seat: Seat, device: torch.device) -> None:
        """See `Engine`. Recompute, then the optimizer, then ZeRO, which takes the parameters of both over."""
        from contextlib import redirect_stdout
        from io import StringIO

        import torch

        from rayswift.config.deepspeed_check import check
        from rayswift.config.deepspeed_json import zero_of
        from rayswift.parallel import deepspeed_ops, optim, sharding
        from rayswift.parallel.trained import HostSum
        from rayswift.parallel.zero_state import ZeroState

        check(job, seat.data_size)
        self._torch, self._device, self._full = torch, device, job.adapter is None
        self.data_rank, self.data_size = seat.data_rank, seat.data_size
        self._host_sum = HostSum(seat)
        if job.model.activation_checkpointing:
            sharding.recompute_blocks(model)
        optimizer = optim.build_optimizer(model, job.train)
        name_of = {parameter: name for name, parameter in model.named_parameters()}
        groups = [dict(group) for group in optimizer.param_groups]
        names = [[name_of[parameter] for parameter in group["params"]] for group in groups]
        exact = _exact_weights(model) if job.model.dtype != "float32" else {}
        deepspeed = deepspeed_ops.start(device)
        if zero_of(job).nvme:
            deepspeed_ops.load_ops()
        config = _settings(model, job, self.data_size, device)
        with redirect_stdout(StringIO()):  # it prints memory figures; warnings go another way
            self._engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=config, dist_init_required=False
            )
        self._state = ZeroState(self._engine, groups, names)
        if exact:
            self._state.set_weights(exact)

    def forward_backward(self, micro_batches: Sequence[PackedBatch], method: Method, count: float) -> StepStats:
        """See `Engine`. DeepSpeed averages gradients over ranks, so a loss is multiplied by their number."""
        from rayswift.parallel.forward import to_device

        self._engine.train()
        loss_sum = self._torch.zeros((), device=self._device)
        factor = self.data_size / max(count, 1e-12)
        for index, batch in enumerate(micro_batches):
            self._engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            loss = method.loss(self._logprobs(batch), to_device(batch, self._device))
            self._engine.backward(loss * factor, scale_wrt_gas=False)
            loss_sum += loss.detach()
        return StepStats(loss_sum=self.sum_over_data([float(loss_sum)])[0], count=count)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """See `Engine`."""
        self._engine.eval()
        with self._torch.no_grad():
            return self._logprobs(batch)

    def optimizer_step(self, stats: StepStats, lr: float) -> StepStats:
        """See `Engine`. DeepSpeed clips, looks for what is not finite, steps and clears."""
        from dataclasses import replace

        from rayswift.parallel.optim import set_learning_rate

        scale = self._scaler
        metrics = dict(stats.metrics) | ({"loss_scale": float(scale.cur_scale)} if scale is not None else {})
        set_learning_rate(self._engine.optimizer, lr)
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return replace(stats, grad_norm=norm, skipped=not self._engine.was_step_applied(), metrics=metrics)

    def sum_over_data(self, values: Sequence[float]) -> list[float]:
        """See `Engine`."""
        return self._host_sum(values)

    def state(self) -> dict[str, Any]:
        """See `Engine`: keys `model`, `optim` and, with float16, `scale`; each tensor is on one rank only."""
        state = self._state.state(full=self._full)
        scaler = self._scaler
        if scaler is None:
            return state
        good = scaler.cur_iter - scaler.last_overflow_iter - 1
        value = self._torch.tensor(float(scaler.cur_scale))
        return state | {"scale": {"value": value, "good_steps": self._torch.tensor(good)}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `Engine`."""
        self._state.load_state(state)
        scaler = self._scaler
        if scaler is not None:
            scaler.cur_scale = float(state["scale"]["value"])
            scaler.cur_iter, scaler.last_overflow_iter = int(state["scale"]["good_steps"]), -1

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Engine`."""
        return self._state.weights()

    @property
    def _scaler(self) -> Any:
        """DeepSpeed's dynamic loss scaler, with float16 only."""
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        return scaler if hasattr(scaler, "last_overflow_iter") else None

    def _logprobs(self, batch: PackedBatch) -> torch.Tensor:
        from rayswift.parallel.forward import batch_logprobs, to_device

        return batch_logprobs(self._engine, to_device(batch, self._device))


def _exact_weights(model: Any) -> dict[str, torch.Tensor]:
    """The trained float32 tensors as they were loaded: DeepSpeed would start from them rounded to 16 bits."""
    trained = ((name, p.data) for name, p in model.named_parameters() if p.requires_grad)
    return {name: tensor for name, tensor in trained if tensor.element_size() > 2}


def _settings(model: Any, job: Job, data_size: int, device: torch.device) -> dict[str, Any]:
    """The configuration of DeepSpeed for this model on this device."""
    from rayswift.config.deepspeed_json import deepspeed_config, section

    text = getattr(model.config, "get_text_config", lambda: model.config)()
    config = deepspeed_config(job, data_size=data_size, hidden_size=getattr(text, "hidden_size", None))
    zero = config["zero_optimization"]
    for key in ("offload_optimizer", "offload_param"):
        if key in zero and device.type == "cpu":
            zero[key]["pin_memory"] = False  # there is no device that would gain from it
    if section(zero, "offload_param").get("device") == "nvme":
        largest = max(-(-p.numel() // data_size) for p in model.parameters())
        zero["offload_param"].setdefault("buffer_size", largest + 2**20)
    return config
