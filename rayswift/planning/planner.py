"""Job + model shape + cluster -> Plan. The only place where a layout is chosen; pure arithmetic.

Engines say what they support and methods say what they need; the planner matches the two and never asks
for a name. What it rejects, it keeps with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rayswift.config.job import Job
from rayswift.errors import PlanError
from rayswift.planning.capability import Capability
from rayswift.planning.hardware import ClusterSpec
from rayswift.planning.layout import Layout
from rayswift.planning.memory import MemoryEstimate, estimate
from rayswift.planning.model_shape import ModelShape
from rayswift.planning.placement import Placement, place
from rayswift.planning.throughput import expected_tokens_per_second, flops_per_token
from rayswift.units import format_bytes, format_count

_USABLE = 0.92  # of a device's memory; the rest is fragmentation and communication buffers


@dataclass(frozen=True)
class Rejected:
    """An alternative that was looked at, and why it was not taken."""

    what: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What the run will do. `layout.world_size == placement.num_workers`."""

    engine: str
    device: str
    layout: Layout
    placement: Placement
    memory: MemoryEstimate
    capacity_bytes: int
    flops_per_token: float
    tokens_per_second: float | None
    rejected: tuple[Rejected, ...] = ()

    def __post_init__(self) -> None:
        assert self.layout.world_size == self.placement.num_workers, "one worker per rank"

    def to_plain(self) -> dict[str, Any]:
        """The plan as plain data for plan.json; `memory.total` is spelled out."""
        plain = asdict(self)
        plain["memory"]["total"] = self.memory.total
        return plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Plan:
        """The plan that `to_plain` wrote."""
        memory = {k: v for k, v in plain["memory"].items() if k != "total"}
        return cls(
            **{k: plain[k] for k in ("engine", "device", "capacity_bytes", "flops_per_token", "tokens_per_second")},
            layout=Layout(**plain["layout"]),
            placement=Placement(**plain["placement"]),
            memory=MemoryEstimate(**memory),
            rejected=tuple(Rejected(**r) for r in plain["rejected"]),
        )

    def summary(self) -> str:
        """The plan in a few lines for a person."""
        parts = {k: v for k, v in asdict(self.memory).items() if v}
        speed = f"{format_count(self.tokens_per_second)} tokens/s expected" if self.tokens_per_second else "unknown"
        lines = [
            f"engine      {self.engine} on {self.device}, {self.layout.describe()}",
            f"workers     {self.placement.num_workers} x {self.placement.resources_per_worker}",
            f"memory      {format_bytes(self.memory.total)} of {format_bytes(self.capacity_bytes)} per worker",
            "            " + ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items()),
            f"compute     {format_count(self.flops_per_token)}FLOP per token; speed {speed}",
        ]
        return "\n".join(lines + [f"rejected    {r.what}: {r.reason}" for r in self.rejected])


def plan(
    job: Job,
    shape: ModelShape,
    cluster: ClusterSpec,
    *,
    engines: Mapping[str, Capability],
    needs: frozenset[str] = frozenset(),
) -> Plan:
    """The plan for a job. `engines` maps each engine to what it supports. Raises PlanError with reason and fix."""
    workers = _workers(job, cluster)
    layout = _layout(job, workers)
    engine, rejected = _engine(job, layout, engines, needs)
    placement = place(layout, cluster)
    _check_batch(job, layout)
    capacity = _capacity(cluster, workers)
    memory = estimate(shape, job, layout)
    if memory.total > _USABLE * capacity:
        raise PlanError(
            f"needs {format_bytes(memory.total)} per worker of {shape.architecture} with {layout.describe()}, "
            f"but a worker has {format_bytes(_USABLE * capacity)}",
            path="model.path",
            value=job.model.path,
            fix=_smaller(job, shape, layout, cluster),
        )
    return Plan(
        engine=engine,
        device=cluster.device,
        layout=layout,
        placement=placement,
        memory=memory,
        capacity_bytes=capacity,
        flops_per_token=flops_per_token(shape, job),
        tokens_per_second=expected_tokens_per_second(shape, job, layout, cluster.gpu),
        rejected=rejected,
    )


def _workers(job: Job, cluster: ClusterSpec) -> int:
    """Number of workers: as told, else every device, else what the explicit axes multiply to on a CPU."""
    if job.cluster.workers != "auto":
        return job.cluster.workers
    p = job.parallel
    asked = p.dp_replicate * p.tp * p.pp * p.cp * (1 if p.dp_shard == "auto" else p.dp_shard)
    return max(asked, cluster.num_devices) if p.dp_shard == "auto" else asked


def _layout(job: Job, workers: int) -> Layout:
    """The layout over these workers. Raises PlanError when the axes do not multiply to them."""
    p = job.parallel
    fixed = p.dp_replicate * p.tp * p.pp * p.cp
    if p.dp_shard != "auto":
        shard = p.dp_shard
    elif workers % fixed == 0:
        shard = workers // fixed
    else:
        raise PlanError(
            f"does not divide into dp_replicate*tp*pp*cp={fixed}",
            path="cluster.workers",
            value=workers,
            fix=f"use a multiple of {fixed}",
        )
    if fixed * shard != workers:
        raise PlanError(
            f"is not the product of the parallel axes ({fixed * shard})",
            path="cluster.workers",
            value=workers,
            fix=f"set cluster.workers={fixed * shard} or parallel.dp_shard=auto",
        )
    if shard % p.ep:
        raise PlanError(
            f"does not divide parallel.dp_shard={shard}, whose workers it spreads the experts over",
            path="parallel.ep",
            value=p.ep,
            fix=f"use a divisor of {shard}, or more workers",
        )
    return Layout(dp_replicate=p.dp_replicate, dp_shard=shard, cp=p.cp, tp=p.tp, pp=p.pp, ep=p.ep)


def _engine(
    job: Job, layout: Layout, engines: Mapping[str, Capability], needs: frozenset[str]
) -> tuple[str, tuple[Rejected, ...]]:
    """The first engine that supports what layout, adapter, dtype and method ask for, and why others do not."""
    wanted = needs | {axis for axis, size in asdict(layout).items() if size > 1} | {job.model.dtype}
    wanted |= {job.adapter.name} if job.adapter else {"full"}
    names = list(engines) if job.parallel.engine == "auto" else [job.parallel.engine]
    rejected: list[Rejected] = []
    for name in names:
        missing = wanted - engines.get(name, Capability(frozenset())).supports
        if not missing:
            return name, tuple(rejected)
        rejected.append(Rejected(f"engine {name}", f"does not support {', '.join(sorted(missing))}"))
    reasons = "; ".join(f"{r.what} {r.reason}" for r in rejected)
    everything = sorted(set().union(*(engine.supports for engine in engines.values())))
    raise PlanError(
        f"no engine of this version can run the job: {reasons}",
        path="parallel.engine",
        value=job.parallel.engine,
        fix=f"this version supports {', '.join(everything)}",
    )


def _check_batch(job: Job, layout: Layout) -> None:
    """Raises PlanError when the global batch does not split evenly over the data ranks."""
    batch, ranks = job.train.global_batch_size, layout.data_size
    if batch % ranks:
        near = max(ranks, round(batch / ranks) * ranks)
        raise PlanError(
            f"does not split over {ranks} data ranks",
            path="train.global_batch_size",
            value=batch,
            fix=f"use a multiple of {ranks}, such as {near}",
        )


def _smaller(job: Job, shape: ModelShape, layout: Layout, cluster: ClusterSpec) -> str:
    """Overrides that would fit, each found by estimating it with the memory its workers would have."""
    for overrides, candidate, other in _alternatives(job, layout, cluster):
        if estimate(shape, candidate, other).total <= _USABLE * _capacity(cluster, other.world_size):
            return f"{overrides} would fit"
    return "use a smaller model, an adapter, or a larger device"


def _alternatives(job: Job, layout: Layout, cluster: ClusterSpec) -> Iterator[tuple[str, Job, Layout]]:
    """(overrides, job, layout) from the cheapest change on. Devices are added, CPU workers taken away: they share."""
    one = job.model_copy(update={"train": job.train.model_copy(update={"micro_batch_size": 1})})
    recompute = one.model_copy(update={"model": job.model.model_copy(update={"activation_checkpointing": True})})
    smallest = "train.micro_batch_size=1 model.activation_checkpointing=true"
    yield "train.micro_batch_size=1", one, layout
    yield smallest, recompute, layout
    shards = [layout.dp_shard * n for n in (2, 4, 8, 16, 32, 64)] if cluster.device != "cpu" else [1]
    for other in (replace(layout, dp_shard=n) for n in shards):
        if job.train.global_batch_size % other.data_size == 0:
            yield f"cluster.workers={other.world_size} parallel.dp_shard=auto {smallest}", recompute, other


def _capacity(cluster: ClusterSpec, workers: int) -> int:
    """Bytes of one worker: of its device, or its share of the memory that CPU workers have together."""
    return cluster.device_memory_bytes or cluster.memory_bytes // workers
