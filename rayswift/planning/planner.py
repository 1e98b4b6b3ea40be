"""Job + model shape + cluster -> Plan. The only place where a layout is chosen; pure arithmetic.

Engines say what they support and methods say what they need; the planner matches the two and never asks
for a name. What it rejects, it keeps with the reason; what it refuses, it refuses with a change that works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rayswift.config import deepspeed_check, deepspeed_json
from rayswift.config.deepspeed_json import Zero
from rayswift.config.job import Job
from rayswift.errors import PlanError, RaySwiftError
from rayswift.planning import alternatives
from rayswift.planning.capability import Capability
from rayswift.planning.capacity import host_bytes, usable, worker_bytes
from rayswift.planning.checks import check_batch, check_dtype, check_layout
from rayswift.planning.hardware import ClusterSpec
from rayswift.planning.layout import Layout
from rayswift.planning.matching import Engines, Rejected, circumstances, instead, match, wanted_features
from rayswift.planning.memory import MemoryEstimate, estimate
from rayswift.planning.model_plan import ModelPlan
from rayswift.planning.model_shape import ModelShape
from rayswift.planning.placement import Placement, place
from rayswift.planning.slices import pipeline_bubble
from rayswift.planning.throughput import expected_tokens_per_second, flops_per_token
from rayswift.planning.warnings import warnings_of
from rayswift.units import format_bytes, format_count


@dataclass(frozen=True)
class Plan:
    """What the run will do. `layout.world_size == placement.num_workers`.

    `bubble` is the share of a step that the workers of a pipeline wait, `zero_stage` that of an engine which has them.
    """

    engine: str
    device: str
    layout: Layout
    placement: Placement
    memory: MemoryEstimate
    capacity_bytes: int
    flops_per_token: float
    tokens_per_second: float | None
    rejected: tuple[Rejected, ...] = ()
    zero_stage: int | None = None
    bubble: float = 0.0
    host_capacity_bytes: int | None = None
    warnings: tuple[str, ...] = ()

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
        return cls(**{
            **plain,
            "layout": Layout(**plain["layout"]),
            "placement": Placement(**plain["placement"]),
            "memory": MemoryEstimate(**{k: v for k, v in plain["memory"].items() if k != "total"}),
            "rejected": tuple(Rejected(**r) for r in plain["rejected"]),
            "warnings": tuple(plain["warnings"]),
        })  # fmt: skip

    def summary(self) -> str:
        """The plan in a few lines for a person."""
        parts = {k: v for k, v in self.memory.parts.items() if v}
        speed = f"{format_count(self.tokens_per_second)} tokens/s expected" if self.tokens_per_second else "unknown"
        stage = f", ZeRO stage {self.zero_stage}" if self.zero_stage else ""
        lines = [
            f"engine      {self.engine} on {self.device}, {self.layout.describe()}{stage}",
            f"workers     {self.placement.num_workers} x {self.placement.resources_per_worker}, "
            f"{self.placement.strategy}",
            f"memory      {format_bytes(self.memory.total)} of {format_bytes(self.capacity_bytes)} per worker",
            "            " + ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items()),
            *self._offloaded(),
            f"compute     {format_count(self.flops_per_token)}FLOP per token; speed {speed}",
        ]
        if self.layout.pp > 1:
            lines.append(f"pipeline    {self.layout.pp} workers in a row, each waits {self.bubble:.0%} of a step")
        lines += [f"warning     {warning}" for warning in self.warnings]
        return "\n".join(lines + [f"rejected    {r.what}: {r.reason}" for r in self.rejected])

    def _offloaded(self) -> list[str]:
        """A line for what lies on the host, and one for what lies on its disk."""
        share = f" of {format_bytes(self.host_capacity_bytes)}" if self.host_capacity_bytes else ""
        host = f"host        {format_bytes(self.memory.host)}{share} per worker"
        disk = f"nvme        {format_bytes(self.memory.nvme)} per worker"
        return [line for line, size in ((host, self.memory.host), (disk, self.memory.nvme)) if size]


@dataclass(frozen=True)
class _Given:
    """What a job is planned for: everything but the job, which alternatives change."""

    shape: ModelShape
    cluster: ClusterSpec
    engines: Engines
    needs: frozenset[str]
    model_plan: Callable[[], ModelPlan]


def plan(
    job: Job,
    shape: ModelShape,
    cluster: ClusterSpec,
    *,
    engines: Mapping[str, Capability],
    needs: frozenset[str] = frozenset(),
    model_plan: Callable[[], ModelPlan] = ModelPlan,
    absent: frozenset[str] = frozenset(),
) -> Plan:
    """The plan for a job. Raises PlanError with reason and fix.

    `engines` maps each engine to what it can do, `absent` are the optional packages that are not installed.
    `model_plan` looks up how transformers can cut the model; it is called only where a layout asks.
    """
    return _decide(job, _Given(shape, cluster, Engines(engines, absent), needs, model_plan), advise=True)


def _decide(job: Job, given: _Given, *, advise: bool) -> Plan:
    """The plan of a job. Without `advise` a refusal names no alternative: it is one that is being looked at."""
    shape, cluster = given.shape, given.cluster
    workers = _workers(job, cluster)
    layout = _layout(job, workers)
    check_dtype(job, cluster)
    check_layout(job, shape, layout, given.model_plan)
    engine, rejected = _engine(job, layout, given, advise=advise)
    placement = place(layout, cluster)
    check_batch(job, layout)
    zero = _zero(job, layout) if "zero_stage" in given.engines.capabilities[engine].supports else None
    memory = estimate(shape, job, layout, zero)
    _check_memory(job, layout, memory, given, advise=advise)
    return Plan(
        engine=engine,
        device=cluster.device,
        layout=layout,
        placement=placement,
        memory=memory,
        capacity_bytes=worker_bytes(cluster, workers),
        flops_per_token=flops_per_token(shape, job),
        tokens_per_second=expected_tokens_per_second(shape, job, layout, cluster.gpu),
        rejected=rejected,
        zero_stage=zero.stage if zero else None,
        bubble=pipeline_bubble(layout, job.parallel.schedule, job.num_micro_batches(layout.data_size)),
        host_capacity_bytes=host_bytes(cluster, workers),
        warnings=warnings_of(job, layout, cluster),
    )


def _workers(job: Job, cluster: ClusterSpec) -> int:
    """Number of workers: as told, else every device, else what the explicit axes multiply to on a CPU."""
    if job.cluster.workers != "auto":
        return job.cluster.workers
    p = job.parallel
    asked = p.dp_replicate * p.tp * p.pp * p.cp * (p.ep if p.dp_shard == "auto" else p.dp_shard)
    return max(asked, cluster.num_devices) if p.dp_shard == "auto" else asked


def _layout(job: Job, workers: int) -> Layout:
    """The layout over these workers: `dp_shard: auto` takes what the other axes leave, all of it.

    Sharding over everything needs the least memory, and costs speed only where a network is slow; then a person
    says dp_replicate. Raises PlanError when the axes do not multiply to the workers.
    """
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


def _engine(job: Job, layout: Layout, given: _Given, *, advise: bool) -> tuple[str, tuple[Rejected, ...]]:
    """The preferred engine that can run the job, and why others do not. Raises PlanError when none can."""
    wanted, met = wanted_features(job, layout, given.needs), circumstances(job, given.shape)
    engine, rejected = match(job, given.engines, wanted, met)
    if engine is not None:
        return engine, rejected
    fix = _runnable(job, given, wanted, met) if advise else None
    raise PlanError(
        f"cannot run the job: {'; '.join(f'{r.what} {r.reason}' for r in rejected)}",
        path="parallel.engine",
        value=job.parallel.engine,
        fix=fix,
    )


def _runnable(job: Job, given: _Given, wanted: frozenset[str], met: frozenset[str]) -> str:
    """What an engine says works instead, else the fewest overrides after which the job can be planned."""
    if fix := instead(job, given.engines, wanted, met):
        return fix
    candidates = alternatives.runnable(job, given.engines, wanted)
    if found := alternatives.first_that_works(candidates, lambda overrides: _works(job, given, overrides)):
        return f"{found} would work"
    supported = sorted(set().union(*(engine.supports for engine in given.engines.capabilities.values())))
    return f"this version supports {', '.join(supported)}"


def _works(job: Job, given: _Given, overrides: Mapping[str, Any]) -> bool:
    """Whether the job can be planned after these overrides."""
    try:
        _decide(alternatives.changed(job, overrides), given, advise=False)
    except (RaySwiftError, ValueError):  # pydantic's refusal of the changed job is a ValueError
        return False
    return True


def _check_memory(job: Job, layout: Layout, memory: MemoryEstimate, given: _Given, *, advise: bool) -> None:
    """Raises PlanError for a job that needs more than its workers have, on the device or on the host."""
    cluster, workers = given.cluster, layout.world_size
    needs = memory.total + (memory.host if cluster.device == "cpu" else 0)  # there the two are one
    if needs > (has := usable(worker_bytes(cluster, workers))):
        raise PlanError(
            f"needs {format_bytes(needs)} per worker of {given.shape.architecture} with {layout.describe()}, "
            f"but a worker has {format_bytes(has)}",
            path="model.path",
            value=job.model.path,
            fix=_smaller(job, layout, given) if advise else None,
        )
    host = host_bytes(cluster, workers)
    if host is not None and memory.host > usable(host):
        raise PlanError(
            f"moves {format_bytes(memory.host)} per worker to the host with {layout.describe()}, "
            f"but a worker's share of its node's memory is {format_bytes(usable(host))}",
            path="parallel.offload",
            value=job.parallel.offload,
            fix=_smaller(job, layout, given) if advise else None,
        )


def _smaller(job: Job, layout: Layout, given: _Given) -> str:
    """Overrides that would fit, each found by planning the job with them."""
    candidates = alternatives.smaller(job, given.shape, layout, given.cluster)
    if found := alternatives.first_that_works(candidates, lambda overrides: _works(job, given, overrides)):
        return f"{found} would fit"
    for overrides, cluster in alternatives.larger_clusters(job, layout, given.cluster):
        if _works(job, replace(given, cluster=cluster), overrides):
            return f"{alternatives.written(overrides)} would fit on {cluster.num_devices} devices"
    return "use a smaller model, an adapter, or a larger device"


def _zero(job: Job, layout: Layout) -> Zero:
    """How the job is sharded by ZeRO. Raises ConfigError for a DeepSpeed JSON that contradicts the job."""
    deepspeed_check.check(job, layout.data_size)
    return deepspeed_json.zero_of(job)
