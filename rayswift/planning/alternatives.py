"""What a refused job could say instead, as overrides a person can type. Whether one works is found by planning it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from math import gcd
from typing import Any

from rayswift.config.job import Job
from rayswift.planning.capability import Capability
from rayswift.planning.checks import divisors, tensor_sizes
from rayswift.planning.hardware import ClusterSpec
from rayswift.planning.layout import Layout
from rayswift.planning.matching import Engines
from rayswift.planning.model_shape import ModelShape

Overrides = Mapping[str, Any]
Works = Callable[[Overrides], bool]

# How a job stops asking for a feature.
_WITHOUT: dict[str, dict[str, Any]] = {
    **{axis: {f"parallel.{axis}": 1} for axis in ("dp_replicate", "cp", "tp", "pp", "ep")},
    **{dtype: {"model.dtype": "bfloat16"} for dtype in ("float16", "float8")},
    "bfloat16": {"model.dtype": "float32"},
    "nf4": {"model.quantization": None},
    "offload_optimizer": {"parallel.offload": "none"},
    "offload_parameters": {"parallel.offload": "none"},
    "offload_nvme": {"parallel.nvme": None},
    "zero_stage": {"parallel.zero_stage": None, "parallel.deepspeed": None},
}


def changed(job: Job, overrides: Overrides) -> Job:
    """The job after these overrides; a section that was null is made with its defaults."""
    plain = job.model_dump(mode="json")
    for key, value in overrides.items():
        section, _, field = key.partition(".")
        plain[section] = {**(plain[section] or {}), field: value}
    return Job.model_validate(plain)


def written(overrides: Overrides) -> str:
    """The overrides as typed on a command line."""
    return " ".join(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in overrides.items())


def first_that_works(candidates: Iterable[Overrides], works: Works) -> str | None:
    """The first of these that works, as typed; None when none does."""
    return next((written(overrides) for overrides in candidates if overrides and works(overrides)), None)


def runnable(job: Job, engines: Engines, wanted: frozenset[str]) -> list[Overrides]:
    """Overrides after which some engine supports all that is asked for, the fewest changes first."""
    found = [{"parallel.engine": "auto"}] if job.parallel.engine != "auto" else []
    for name in engines.considered(job):
        missing = engines.capabilities.get(name, Capability(frozenset())).missing(wanted)
        if missing <= _WITHOUT.keys():
            found.append({key: value for feature in sorted(missing) for key, value in _WITHOUT[feature].items()})
    return sorted((_news(job, overrides) for overrides in found), key=len)


def smaller(job: Job, shape: ModelShape, layout: Layout, cluster: ClusterSpec) -> Iterator[Overrides]:
    """Overrides that may need less memory, from the cheapest on.

    First what changes neither the result nor the hardware, then other layouts and devices that are there already, then
    slower memory, and only then what changes the model that is trained.
    """
    micro: dict[str, Any] = {"train.micro_batch_size": 1}
    least = micro | {"model.activation_checkpointing": True}
    yield _news(job, micro)
    yield _news(job, least)
    more: Overrides
    for more in (*_workers(layout, cluster), *_cuts(shape, layout), *_offloads(job), *_other_models(job)):
        yield _news(job, {**least, **more})


def larger_clusters(job: Job, layout: Layout, cluster: ClusterSpec) -> Iterator[tuple[Overrides, ClusterSpec]]:
    """The job on more nodes of the same kind, to find how many it would take."""
    if cluster.device == "cpu" or not cluster.num_devices:
        return
    for factor in (2, 4, 8, 16, 32, 64):
        workers = layout.world_size * factor
        if workers > cluster.num_devices:
            overrides = {"cluster.workers": workers, "parallel.dp_shard": "auto", "train.micro_batch_size": 1,
                         "model.activation_checkpointing": True}  # fmt: skip
            yield _news(job, overrides), _grown(cluster, workers)


def _news(job: Job, overrides: Overrides) -> dict[str, Any]:
    """The overrides that change something."""
    plain = job.model_dump(mode="json")
    return {k: v for k, v in overrides.items() if (plain[k.partition(".")[0]] or {}).get(k.partition(".")[2]) != v}


def _workers(layout: Layout, cluster: ClusterSpec) -> Iterator[Overrides]:
    """More devices of the cluster, or fewer CPU workers: those share one memory."""
    if cluster.device == "cpu":
        if layout.dp_shard > 1:
            yield {"cluster.workers": layout.world_size // layout.dp_shard, "parallel.dp_shard": "auto"}
        return
    for factor in (2, 4, 8, 16, 32, 64):
        if layout.world_size * factor <= cluster.num_devices:
            yield {"cluster.workers": layout.world_size * factor, "parallel.dp_shard": "auto"}


def _cuts(shape: ModelShape, layout: Layout) -> Iterator[Overrides]:
    """Other layouts of the same workers: the model or its sequences cut further."""
    tensor = divisors(gcd(*tensor_sizes(shape, layout).values()))
    cuts = [("tp", size) for size in tensor if size > layout.tp]
    cuts += [("cp", size) for size in divisors(shape.num_heads // layout.tp) if size > layout.cp]
    cuts += [("pp", size) for size in divisors(layout.world_size) if size > layout.pp]
    for axis, size in cuts:
        if layout.world_size % size == 0:
            yield {f"parallel.{axis}": size, "parallel.dp_shard": "auto"}


def _offloads(job: Job) -> Iterator[Overrides]:
    if job.parallel.offload != "parameters":
        yield {"parallel.offload": "parameters"}


def _other_models(job: Job) -> Iterator[Overrides]:
    """Less precision, then an adapter, then an adapter on a base in 4 bits."""
    dtype = {"model.dtype": "bfloat16"} if job.model.dtype == "float32" else {}
    adapter = {"adapter.name": job.adapter.name if job.adapter else "lora"}
    yield from (dtype, dtype | adapter, dtype | adapter | {"model.quantization": "nf4"})


def _grown(cluster: ClusterSpec, num_devices: int) -> ClusterSpec:
    """The cluster with so many devices, everything else in proportion, on nodes that hold what its nodes hold."""
    factor = num_devices / cluster.num_devices
    per_node = max((node.num_devices for node in cluster.nodes), default=0)
    largest = next((node for node in cluster.nodes if node.num_devices == per_node), None)
    copies = -(-num_devices // per_node) if per_node else 0
    return replace(
        cluster,
        num_devices=num_devices,
        num_cpus=cluster.num_cpus * factor,
        memory_bytes=int(cluster.memory_bytes * factor),
        num_nodes=copies or int(-(-cluster.num_nodes * factor // 1)),
        nodes=tuple(replace(largest, id=f"node {n}") for n in range(copies)) if largest and per_node else (),
    )
