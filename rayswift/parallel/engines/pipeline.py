"""Pipeline parallelism: torch's schedules over stages that are spread and sharded like a whole model.

Micro-batches of a step get one shape and as many as the schedule wants: what is added counts nothing. Knows which stage
is where and what flows between them; how a stage is cut is in `stages.py`. torch is loaded inside the class, so that a
driver can read `capability` without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rayswift.config.job import Job
from rayswift.parallel.engine import StepStats
from rayswift.planning.capability import CUTTING, Capability
from rayswift.planning.layout import Seat
from rayswift.planning.stages import STAGES_PER_RANK, num_stages, stage_owner, stages_of

if TYPE_CHECKING:
    import torch

    from rayswift.data.types import PackedBatch
    from rayswift.methods import Method
    from rayswift.parallel.context import ContextPart
    from rayswift.parallel.stages import Stage


class Pipeline:
    """A model cut into stages along its blocks, each of them under FSDP2 and tensor parallelism as in `Fsdp2`."""

    fills: ClassVar[bool] = True
    capability: ClassVar[Capability] = Capability(
        supports=frozenset(
            {
                *("pp", "dp_replicate", "dp_shard", "tp", "ep", "cp"),
                *("float32", "bfloat16", "float16"),
                *("full", "lora", "nf4"),
            }
        ),
        conflicts=CUTTING,
        preference=10,
    )

    def __init__(self, model: Any, job: Job, seat: Seat, device: torch.device) -> None:
        """See `Engine`. Spread what is computed, cut into stages, shard each, then build the optimizer."""
        import torch

        from rayswift.parallel import filling, mesh, precision, sharding, stages, tensor
        from rayswift.parallel.tie import untie
        from rayswift.parallel.trained import HostSum, Trained

        self._torch, self._device = torch, device
        self._dtype = precision.compute_dtype(job.model.dtype)
        self._schedule, self._pp, self._rank = job.parallel.schedule, seat.layout.pp, seat.coordinate["pp"]
        self._num_stages = num_stages(self._schedule, self._pp)
        mine = stages_of(self._schedule, self._pp, self._rank)
        self.data_rank, self.data_size = seat.data_rank, seat.data_size
        meshes = mesh.build_meshes(seat, device)
        self._group = meshes.dense["pp"].get_group()
        self._context = meshes.data["cp"] if seat.layout.cp > 1 else None
        self._hidden_size = int(tensor.unwrapped(model).config.get_text_config().hidden_size)

        filler = filling.Filler(model, sharding.receiving_device(job, device))
        found = sharding.spread(model, job, meshes)
        tie = untie(model, self._ends(seat), seat.rank)
        self._stages = dict(zip(mine, stages.cut(model, mine, self._num_stages, self._run_stage), strict=True))
        plan = sharding.Sharding.of(meshes, job, device, reshard_after_forward=False)
        stage_units = [sharding.units_of(s, plan, found.experts, casts_output=False) for s in self._stages.values()]
        sharding.shard(model, [unit for units in stage_units for unit in units], filler)
        self._vocabulary = tensor.vocabulary_of(model)
        self._trained = Trained(
            model, job, partial=found.partial, tp=meshes.dense["tp"], stages=self._group, tie=tie
        )  # fmt: skip
        self._host_sum = HostSum(seat)
        self._schedules: dict[tuple[int, ...], Any] = {}
        self._batches: list[PackedBatch] = []
        self._parts: list[ContextPart] = []

    def forward_backward(self, micro_batches: Sequence[PackedBatch], method: Method, count: float) -> StepStats:
        """See `Engine`. Gradients are reduced once, after the last backward pass of each stage."""
        self._take(micro_batches, count=-(-len(micro_batches) // self._pp) * self._pp)
        factor = self._trained.loss_scale / max(count, 1e-12)
        losses: list[torch.Tensor] = []

        def loss_of(logprobs_BT: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            loss = method.loss(logprobs_BT, self._batches[int(index)])
            losses.append(loss.detach())
            return loss * factor

        for stage in self._stages.values():
            stage.train()
        self._run_schedule(loss_of)
        total = self._torch.zeros((), device=self._device) + sum(losses)
        self._torch.distributed.all_reduce(total, group=self._group)  # of all stages, the last alone has losses
        return StepStats(loss_sum=self.sum_over_data([float(total)])[0], count=count)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """See `Engine`. One micro-batch goes through the stages one after the other."""
        from rayswift.parallel.sharding import reshard

        length = batch.input_ids_BT.shape[1]
        self._take([batch], count=1)
        index = self._torch.zeros(1, dtype=self._torch.long)
        x = index
        with self._torch.no_grad():
            for number in range(self._num_stages):
                if number in self._stages:
                    x = self._stages[number].eval()(x, index)
                    reshard(self._stages[number])
                x = self._hand_on(x, number)
        return x[:, :length]

    def optimizer_step(self, stats: StepStats, lr: float) -> StepStats:
        """See `Engine`."""
        return self._trained.step(stats, lr)

    def sum_over_data(self, values: Sequence[float]) -> list[float]:
        """See `Engine`."""
        return self._host_sum(values)

    def state(self) -> dict[str, Any]:
        """See `Engine`: of this rank's stages; torch.distributed.checkpoint joins what the ranks hand in."""
        return self._trained.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `Engine`."""
        self._trained.load_state(state)

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Engine`: each rank of the pipeline gives those of its own stages."""
        return self._trained.weights()

    def _ends(self, seat: Seat) -> list[tuple[int, int]]:
        """The ranks of the first and the last stage of each pipeline of the world."""
        last = stage_owner(self._schedule, self._pp, self._num_stages - 1)
        per_stage = seat.layout.world_size // self._pp
        return [(seat.order[place], seat.order[last * per_stage + place]) for place in range(per_stage)]

    def _take(self, micro_batches: Sequence[PackedBatch], *, count: int) -> None:
        """Make the micro-batches alike and keep them for the stages."""
        from rayswift.parallel.context import ContextPart
        from rayswift.parallel.forward import alike, to_device

        multiple = self._context.size() if self._context is not None else 1
        batches = alike(micro_batches, count=count, multiple_of=multiple)
        self._batches = [to_device(batch, self._device) for batch in batches]
        if self._context is not None:
            self._parts = [ContextPart(self._context, batch.position_ids_BT) for batch in self._batches]

    def _run_stage(self, stage: Stage, hidden_BtH: torch.Tensor | None, index: int) -> torch.Tensor:
        """What a stage makes of a micro-batch: hidden states, or log-probabilities [B, T] of the last one."""
        from rayswift.parallel.context import KEYWORD
        from rayswift.parallel.logprobs import token_logprobs

        batch = self._batches[index]
        part = self._parts[index] if self._context is not None else None
        cut = part.cut if part is not None else lambda tensor_BT: tensor_BT
        inputs: dict[str, Any] = {"position_ids": cut(batch.position_ids_BT), "use_cache": False}
        inputs |= {KEYWORD: part} if part is not None else {}
        inputs |= {"input_ids": cut(batch.input_ids_BT)} if hidden_BtH is None else {"inputs_embeds": hidden_BtH}
        if not stage.last:
            return stage.hidden(**inputs)
        logprobs_Bt = token_logprobs(stage.logits(**inputs), cut(batch.targets_BT), self._vocabulary)
        return part.join(logprobs_Bt) if part is not None else logprobs_Bt

    def _run_schedule(self, loss_of: Any) -> None:
        index = self._torch.arange(len(self._batches))
        schedule = self._schedule_for(len(self._batches), *self._batches[0].input_ids_BT.shape)
        schedule._loss_fn = loss_of
        tokens = (index,) if 0 in self._stages else ()
        target = {"target": index, "losses": []} if self._num_stages - 1 in self._stages else {}
        schedule.step(*tokens, index=index, return_outputs=False, **target)

    def _schedule_for(self, count: int, rows: int, length: int) -> Any:
        """The schedule for this many micro-batches of this shape; kept, because a stage's buffers have the shape."""
        from torch.distributed import pipelining

        key = (count, rows, length)
        if key not in self._schedules:
            self._schedules.clear()
            classes = {
                "1f1b": pipelining.Schedule1F1B,
                "interleaved_1f1b": pipelining.ScheduleInterleaved1F1B,
                "zero_bubble": pipelining.ScheduleInterleavedZeroBubble,
                "zbv": pipelining.ScheduleZBVZeroBubble,
            }
            stages = [self._pipeline_stage(number, rows, length) for number in self._stages]
            several = STAGES_PER_RANK[self._schedule] > 1
            self._schedules[key] = classes[self._schedule](
                stages if several else stages[0], n_microbatches=count, loss_fn=lambda *_: None, scale_grads=False
            )
        return self._schedules[key]

    def _pipeline_stage(self, number: int, rows: int, length: int) -> Any:
        """torch's side of a stage, told what flows in and out, so that it need not ask its neighbours."""
        from torch.distributed.pipelining import PipelineStage

        stage = self._stages[number]
        ways = self._context.size() if self._context is not None else 1
        flows: dict[str, Any] = {"device": "meta", "requires_grad": True}  # without which torch sends no gradient back
        hidden = self._torch.empty(rows, length // ways, self._hidden_size, dtype=self._dtype, **flows)
        return PipelineStage(
            stage,
            number,
            self._num_stages,
            self._device,
            input_args=self._torch.empty(1, dtype=self._torch.long, device="meta") if stage.first else hidden,
            output_args=self._torch.empty(rows, length, **flows) if stage.last else hidden,
            group=self._group,
        )

    def _hand_on(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """What stage `number` made, on the rank of the next stage; what the last one made, on every rank."""
        dist = self._torch.distributed
        here = stage_owner(self._schedule, self._pp, number)
        batch, last = self._batches[0], number == self._num_stages - 1
        there = here if last else stage_owner(self._schedule, self._pp, number + 1)
        ways = self._context.size() if self._context is not None else 1
        rows, length = batch.input_ids_BT.shape
        if last:
            whole = x if self._rank == here else self._torch.empty(rows, length, device=self._device)
            dist.broadcast(whole, group=self._group, group_src=here)
            return whole
        if here == there or self._rank not in (here, there):
            return x
        if self._rank == here:
            dist.send(x.contiguous(), group=self._group, group_dst=there)
            return x
        shape = (rows, length // ways, self._hidden_size)
        arrived = self._torch.empty(shape, dtype=self._dtype, device=self._device)
        dist.recv(arrived, group=self._group, group_src=here)
        return arrived
