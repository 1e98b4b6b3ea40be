"""What the processes of a spec are given: cores, accelerators, the engine's environment, and how many there are.

Pure functions from a ServeSpec to what Ray and Ray Serve take; knows neither.
"""

from __future__ import annotations

import shlex
from math import ceil
from typing import Any

from rayswift import plugins
from rayswift.errors import ConfigError
from rayswift.serving import bodies
from rayswift.serving.engine import EngineOptions
from rayswift.serving.spec import ServeSpec


def engine_options(spec: ServeSpec, folder: str, number: int = 0) -> EngineOptions:
    """What the engine of one of the spec's folders is built with, which is its replica's model of that number.

    Each has GPUs of its own where there are enough; else models share them, and the memory that vLLM takes of one.
    """
    places = max(1, int(spec.gpus // spec.tensor_parallel))
    place = number % places
    num_sharing = len(range(place, len(spec.models), places))
    first = place * spec.tensor_parallel
    return EngineOptions(
        max_concurrency=spec.max_concurrency,
        max_model_len=spec.max_model_len,
        dtype=spec.dtype,
        device=spec.device,
        media=spec.media,
        adapters=any(spec.models[name] == folder for name in spec.adapters),
        max_adapters=spec.max_adapters,
        max_adapter_rank=spec.max_adapter_rank,
        tensor_parallel=spec.tensor_parallel,
        device_ids=tuple(range(first, first + spec.tensor_parallel)) if places > 1 else (),
        gpu_memory_fraction=spec.gpu_memory_fraction * min(1, spec.gpus or 1) / num_sharing,
        kv_cache_bytes=spec.kv_cache_bytes,
    )


_SPARE_REQUESTS = 2 * bodies.MAX_SLOW
"""Requests Serve lets in beyond the engine's places, so that refusals are answered by us and at once.

Slow bodies keep at most half of them."""
_MAX_WAITING_REQUESTS = 256
"""Requests that may wait in Serve's proxy for one of those; further ones are told 503 and when to come back."""
_SERVING = {
    # Our app never blocks its loop, and in a loop of its own every chunk of a stream would cross threads twice.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # gRPC's most: between a front and a version images and sounds travel as the model reads them.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
    "TOKENIZERS_PARALLELISM": "false",
}
"""The environment of every process of an endpoint."""
SURGE_PERCENT = 25
"""Replicas that an update starts beyond their number, rounded up, before it stops as many old ones."""


def serve_options(spec: ServeSpec, max_surge_percent: int = SURGE_PERCENT) -> dict[str, Any]:
    """How Serve fills, updates and ends the replicas of any deployment of a spec; see `surge_percent`."""
    places = len(spec.models) * (spec.max_concurrency + spec.max_queued)
    return {
        "max_ongoing_requests": places + _SPARE_REQUESTS,
        "max_queued_requests": _MAX_WAITING_REQUESTS,
        "max_surge_percent": max_surge_percent,
        "max_constructor_retry_count": 1,  # a model that does not load does not load the second time either
        "graceful_shutdown_wait_loop_s": 0.5,
        # An update lets every answer end; a stop does not wait as long, see `controller`.
        "graceful_shutdown_timeout_s": spec.request_timeout_s,
    }


def routing_options(spec: ServeSpec) -> dict[str, Any]:
    """How Serve chooses among the replicas of a version."""
    if spec.routing == "load":
        return {}
    router = {
        "request_router_class": "rayswift.serving.prefix_router.PrefixRouter",
        "request_router_kwargs": {"imbalanced_threshold": max(2, spec.max_concurrency // 2), "do_eviction": True},
    }
    return {"request_router_config": router}


def front_options(spec: ServeSpec) -> dict[str, Any]:
    """What Ray gives a process that has no engine in it: no core of its own, and the environment of the endpoint."""
    variables = {**_SERVING, "OMP_NUM_THREADS": "1", "grpc_proxy": ""}  # a proxy for the web is none for replicas
    if spec.routing == "load":
        # A router in a loop of its own has every delta cross threads. Ray's prefix router waits for an actor meanwhile.
        variables["RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"] = "0"
    return {"num_cpus": 0, "runtime_env": {"env_vars": variables}}


def with_gpus(spec: ServeSpec, num_gpus: float) -> tuple[ServeSpec, str | None]:
    """The spec with its replicas' GPUs, of a cluster with so many, and for a person what was chosen.

    As asked, or `tensor_parallel` for each model; models share one where there are too few for all (each version has
    its part of one, where they are `promotable`). None where the device is another, or there are none: under Ray 2.60 a
    process without a reserved GPU would take the first one behind Ray's back. Raises ConfigError for device=cuda
    without a GPU, and where `tensor_parallel` wants more for a replica than there are.
    """
    if spec.gpus_per_replica is not None:
        return spec, None
    if not num_gpus and spec.device == "cuda":
        raise ConfigError("needs a GPU, and Ray's cluster has none", path="device", value="cuda",
                          fix="use auto, or start Ray's nodes with --num-gpus")  # fmt: skip
    if not num_gpus or spec.device in ("cpu", "npu", "mps"):
        return spec.model_copy(update={"gpus_per_replica": 0}), None
    num_models = 1 if spec.promotable else len(spec.models)  # of a replica
    num_replicas = (spec.max_replicas or spec.num_replicas) * (len(spec.models) if spec.promotable else 1)
    wanted: float = spec.tensor_parallel * num_models
    if wanted > num_gpus and spec.tensor_parallel > 1:
        raise ConfigError(
            f"needs {wanted:g} GPUs for a replica, and Ray's cluster has {num_gpus:g}", path="tensor_parallel",
            value=spec.tensor_parallel,
            fix=f"lower it; for nodes that are still to come name gpus_per_replica: {wanted:g}",
        )  # fmt: skip
    if spec.tensor_parallel == 1 and wanted * num_replicas > num_gpus:
        # Replicas of one model do not share: what they lack may still come, and a second one on a GPU gains little.
        wanted = _part(min(len(spec.models), ceil(num_replicas / num_gpus))) if spec.promotable else 1
    told = f"gpus_per_replica={wanted:g}, of {num_gpus:g} GPUs of the cluster"
    if wanted * num_replicas > num_gpus:
        told += f"; {num_replicas} replicas take {wanted * num_replicas:g}, and one that finds none waits for it"
    elif spec.promotable and num_gpus < (num_replicas + spec.num_replicas) * wanted:
        told += "; a version to promote needs as many free"
        if spec.tensor_parallel == 1:
            part = _part(ceil((num_replicas + spec.num_replicas) / num_gpus))
            told += f": {part:g} leaves room for it beside the live one"
    return spec.model_copy(update={"gpus_per_replica": wanted}), told


def _part(num_sharing: int) -> float:
    """Of a GPU, as Ray counts: so many ten thousandths."""
    return 10_000 // num_sharing / 10_000


def surge_percent(spec: ServeSpec, num_gpus: float) -> tuple[int, str | None]:
    """Replicas that an update may start beyond their number, of a cluster with so many GPUs, and for a person why none.

    With every GPU reserved the first new replica would wait for ever for an old one, which waits for it. Where not
    even the replicas themselves fit, the GPUs are elsewhere or still to come, and this says nothing.
    """
    if not spec.gpus:
        return SURGE_PERCENT, None
    room = num_gpus // spec.gpus if spec.gpus >= 1 else num_gpus * int(1 / spec.gpus)
    # Of replicas that follow the load some may be free when the update comes: their least number counts.
    if room != spec.num_replicas:  # with room for one more, new ones come one after the other
        return SURGE_PERCENT, None
    break_ = "" if spec.num_replicas > 1 else ", and nobody answers until that one is there"
    return 0, (
        f"an update ends a replica before it starts the next{break_}: {spec.num_replicas} x {spec.gpus:g} of "
        f"{num_gpus:g} GPUs leave no room for both; for a cluster that grows give the deployment endpoint "
        f"max_surge_percent: {SURGE_PERCENT} in Serve's config"
    )


def with_cores(spec: ServeSpec, cores: float) -> ServeSpec:
    """The spec with its replicas' cores, of a cluster that serves nothing else: as asked, or equal shares.

    One core is left to Serve's proxy: on two cores a second thread of `local` answered no more over HTTP. One core each
    where an accelerator computes, or where versions come and go (`promotable`): the next one needs room.
    """
    if spec.cpus_per_replica is not None or spec.gpus or spec.promotable:
        return spec
    share = (int(cores) - 1) // (spec.max_replicas or spec.num_replicas)
    return spec.model_copy(update={"cpus_per_replica": max(1, share)})


def actor_options(spec: ServeSpec) -> dict[str, Any]:
    """What Ray gives a process that holds the spec's engines: cores, accelerators, and the engine's environment.

    The engine of the spec is one that `environment.resolved` chose.
    """
    engine = plugins.load("serving.engines", spec.engine, path="engine")
    threads = str(max(1, int(spec.cpus)))
    # Without a reserved one Ray 2.60 leaves every GPU visible, and Apple's and NPUs are none to it.
    on_cpu = {} if spec.gpus else {**getattr(engine, "environment_on_cpu", {}), "CUDA_VISIBLE_DEVICES": ""}
    variables = {**getattr(engine, "environment", {}), **on_cpu, **_SERVING, "OMP_NUM_THREADS": threads}
    python = {"py_executable": shlex.quote(spec.engine_python)} if spec.engine_python else {}
    kind = {"accelerator_type": spec.accelerator_type} if spec.accelerator_type else {}
    return {
        "num_cpus": spec.cpus,
        "num_gpus": spec.gpus,
        "runtime_env": {"env_vars": variables, **python},
        **kind,
    }


def replica_options(spec: ServeSpec) -> dict[str, Any]:
    """How many replicas Serve keeps: a number, or bounds between which it follows the load."""
    if spec.max_replicas is None:
        return {"num_replicas": spec.num_replicas}
    aim = spec.target_ongoing_requests or max(1.0, 0.75 * spec.max_concurrency * len(spec.models))
    return {
        "autoscaling_config": {
            "min_replicas": spec.num_replicas, "max_replicas": spec.max_replicas, "target_ongoing_requests": aim
        }
    }  # fmt: skip
