"""Where a DeepSpeed JSON and a job contradict each other, and what of either DeepSpeed cannot run.

The job is always the one that trains, so a value that differs is an error and never a silent choice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rayswift.config.deepspeed_json import AUTO, OFFLOADS, device_of, read, section, zero_of
from rayswift.config.job import Job
from rayswift.errors import ConfigError

_EPS = 1e-8  # that of torch's AdamW, which is ours
_DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16"}
_OPTIMIZERS = {"adam": "adamw", "adamw": "adamw", "sgd": "sgd"}  # DeepSpeed's Adam decouples weight decay, too
_FIXED: dict[str, Any] = {
    "gradient_allreduce_op": "mean", "managed_gradient_accumulation": True, "sequence_parallel_size": 1,
}  # fmt: skip


def check(job: Job, data_size: int | None = None) -> None:
    """Raises one ConfigError that lists every contradiction; see `contradictions`."""
    found = contradictions(job, data_size)
    if not found:
        return
    given, places = job.parallel.deepspeed, "".join(f"\n  - {line}" for line in found)
    if given is None:
        raise ConfigError(f"cannot be run by DeepSpeed:{places}", path="parallel")
    raise ConfigError(
        f"contradicts the job:{places}",
        path="parallel.deepspeed",
        value=given,
        fix='write "auto" for these keys or leave them out, or change the job',
    )


def contradictions(job: Job, data_size: int | None = None) -> list[str]:
    """Every key with two values, `DEEPSPEED.KEY=a contradicts JOB.KEY=b`.

    Accumulation is checked once the number of data ranks is known. Raises ConfigError when the JSON cannot be read.
    """
    given = read(job)
    lines = [*_batch_sizes(given, job, data_size), *_optimizer(given, job), *_precision(given, job)]
    return [*lines, *_placement(section(given, "zero_optimization"), job), *_foreign(given)]


def _batch_sizes(given: Mapping[str, Any], job: Job, data_size: int | None) -> Iterator[str]:
    train = job.train
    yield from _differs("train_batch_size", given, "train.global_batch_size", train.global_batch_size)
    yield from _differs("train_micro_batch_size_per_gpu", given, "train.micro_batch_size", train.micro_batch_size)
    if data_size is not None:
        name = f"train.global_batch_size / train.micro_batch_size / {data_size} ranks"
        yield from _differs("gradient_accumulation_steps", given, name, job.num_micro_batches(data_size))
    clipping = given.get("gradient_clipping", AUTO)
    if clipping != AUTO and (clipping or None) != train.max_grad_norm:
        yield f"gradient_clipping={_spelled(clipping)} contradicts train.max_grad_norm={_spelled(train.max_grad_norm)}"


def _optimizer(given: Mapping[str, Any], job: Job) -> Iterator[str]:
    train, optimizer = job.train, section(given, "optimizer")
    kind = optimizer.get("type", AUTO)
    if kind != AUTO and _OPTIMIZERS.get(str(kind).lower()) != train.optimizer:
        yield f"optimizer.type={kind} contradicts train.optimizer={train.optimizer}"
    ours: dict[str, tuple[str, Any]] = {
        "lr": ("train.lr", train.lr), "weight_decay": ("train.weight_decay", train.weight_decay),
    }  # fmt: skip
    if train.optimizer == "adamw":
        ours["betas"] = ("train.betas", list(train.betas))
        ours["eps"] = ("train.optimizer=adamw with eps", _EPS)
        ours["adam_w_mode"] = ("train.optimizer=adamw with adam_w_mode", True)
    else:
        ours["momentum"] = ("train.momentum", train.momentum)
    for key, (name, value) in ours.items():
        yield from _differs(key, section(optimizer, "params"), name, value, prefix="optimizer.params.")
    if "scheduler" in given:
        kind = section(given, "scheduler").get("type")
        yield f"scheduler.type={_spelled(kind)} contradicts train.schedule={train.schedule}: leave the section out"


def _precision(given: Mapping[str, Any], job: Job) -> Iterator[str]:
    dtype = job.model.dtype
    for key, name in _DTYPES.items():
        enabled = section(given, key).get("enabled", AUTO)
        if enabled != AUTO and bool(enabled) != (dtype == name):
            yield f"{key}.enabled={_spelled(enabled)} contradicts model.dtype={dtype}"
    for key in ("amp", "torch_autocast"):
        if section(given, key).get("enabled") not in (None, False, AUTO):
            yield f"{key}.enabled=true contradicts model.dtype={dtype}"


def _placement(given: Mapping[str, Any], job: Job) -> Iterator[str]:
    """Stage and offload: against the job's, and against what each stage can do."""
    parallel, zero = job.parallel, zero_of(job)
    stage = f"zero_optimization.stage={zero.stage}"
    if zero.stage != (parallel.zero_stage or zero.stage):
        yield f"{stage} contradicts parallel.zero_stage={parallel.zero_stage}"
    if zero.stage == 0:
        yield f"{stage}, which is plain data parallelism, contradicts parallel.engine=deepspeed: use fsdp2"
    if zero.stage < 3 and zero.offload_parameters:
        yield f"{stage} contradicts offloading parameters, which needs stage 3"
    if zero.stage < 3 and zero.nvme:
        yield f"{stage} contradicts offloading to NVMe, which needs stage 3"
    if parallel.nvme is not None and not zero.nvme:
        yield f"offloading nothing to NVMe contradicts parallel.nvme={parallel.nvme}"
    for key, asking in OFFLOADS.items():
        if device_of(given, key, job) == "none" and parallel.offload in asking:
            yield f"zero_optimization.{key}.device=none contradicts parallel.offload={parallel.offload}"
        yield from _nvme_paths(given, key, job)
    yield from _differs("compute_grad_norm", given, "clipping and the finite check", True, "zero_optimization.")
    ratio = section(given, "offload_optimizer").get("ratio", AUTO)
    if ratio not in (AUTO, 1):
        yield f"zero_optimization.offload_optimizer.ratio={ratio} contradicts torch's optimizer, which is on one device"


def _nvme_paths(given: Mapping[str, Any], key: str, job: Job) -> Iterator[str]:
    path, ours = section(given, key).get("nvme_path", AUTO), job.parallel.nvme
    if device_of(given, key, job) != "nvme":
        return
    if path in (AUTO, None) and ours is None:
        yield f"zero_optimization.{key}.device=nvme contradicts parallel.nvme=null: name the folder"
    if path not in (AUTO, None, ours) and ours is not None:
        yield f"zero_optimization.{key}.nvme_path={path} contradicts parallel.nvme={ours}"


def _foreign(given: Mapping[str, Any]) -> Iterator[str]:
    """Keys that would change what a step means: losses are sums over a global count, and the layout is the job's."""
    for key, value in _FIXED.items():
        yield from _differs(key, given, f"the engine's own {key}", value)
    ways = section(given, "tensor_parallel").get("autotp_size", 0)
    if ways not in (0, 1, AUTO):
        yield f"tensor_parallel.autotp_size={ways} contradicts parallel.tp, which the deepspeed engine has not"


def _differs(key: str, given: Mapping[str, Any], name: str, ours: Any, prefix: str = "") -> Iterator[str]:
    """One line when a value is given, is not `auto`, and is not ours."""
    value = given.get(key, AUTO)
    if value not in (AUTO, None) and value != ours:
        yield f"{prefix}{key}={_spelled(value)} contradicts {name}={_spelled(ours)}"


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
