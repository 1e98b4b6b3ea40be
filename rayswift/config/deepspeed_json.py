"""A user's DeepSpeed JSON, or the same written as `parallel.zero_stage`, `offload` and `nvme`, filled from the job.

Knows DeepSpeed's keys and the job's; imports neither DeepSpeed nor torch. What the job decides (batch sizes, optimizer,
schedule, precision, clipping) may be left out, be `auto`, or say the same: see `deepspeed_check.py`. `auto` is filled
as in transformers/integrations/deepspeed.py.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rayswift.config.job import Job
from rayswift.errors import ConfigError

AUTO = "auto"
DEFAULT_STAGE = 3
OFFLOADS = {"offload_optimizer": ("optimizer", "parameters"), "offload_param": ("parameters",)}
"""DeepSpeed's section for what is moved out -> the values of `parallel.offload` that ask for it."""
_CPU = {"device": "cpu"}
SHORTHANDS: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero2_offload": {"stage": 2, "offload_optimizer": _CPU},
    "zero3_offload": {"stage": 3, "offload_optimizer": _CPU, "offload_param": _CPU},
}
"""What users of ms-swift write instead of a path."""


@dataclass(frozen=True)
class Zero:
    """What is spread over the data ranks, and what lies elsewhere between uses: all that memory planning needs."""

    stage: int
    offload_optimizer: bool = False
    offload_parameters: bool = False
    nvme: bool = False


def zero_of(job: Job) -> Zero:
    """The ZeRO stage and offload of a job on the deepspeed engine, those of its JSON when it has one.

    Raises ConfigError when the JSON cannot be read.
    """
    zero = section(read(job), "zero_optimization")
    stage = zero.get("stage", 0)  # DeepSpeed's default
    optimizer, parameters = (device_of(zero, key, job) for key in OFFLOADS)
    return Zero(
        stage=(job.parallel.zero_stage or DEFAULT_STAGE) if stage == AUTO else int(stage),
        offload_optimizer=optimizer != "none",
        offload_parameters=parameters != "none",
        nvme="nvme" in (optimizer, parameters),
    )


def read(job: Job) -> dict[str, Any]:
    """The JSON that `parallel.deepspeed` names, or what stands for it. Raises ConfigError when it cannot be read."""
    name = job.parallel.deepspeed
    if name is None:
        asked = {key: {"device": AUTO} for key, values in OFFLOADS.items() if job.parallel.offload in values}
        return {"zero_optimization": {"stage": AUTO, **asked}}
    if name in SHORTHANDS and not os.path.exists(name):
        return {"zero_optimization": copy.deepcopy(SHORTHANDS[name])}
    try:
        with open(name, encoding="utf-8") as stream:
            found = json.load(stream)
    except OSError as error:
        raise _unreadable(name, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise _unreadable(name, f"is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise _unreadable(name, "is not a JSON object")
    return found


def deepspeed_config(job: Job, *, data_size: int, hidden_size: int | None) -> dict[str, Any]:
    """What `deepspeed.initialize` is given: the JSON without `auto`, completed from the job. Unknown keys are kept.

    The sections `optimizer` and `scheduler` are left out: both are the job's. The job has passed `check`. Raises
    ConfigError for an `auto` that nothing decides.
    """
    config = {key: copy.deepcopy(value) for key, value in read(job).items() if key not in _THE_JOBS}
    dtype, train = job.model.dtype, job.train
    config |= {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": job.num_micro_batches(data_size),
        "gradient_clipping": train.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    for name, wanted in (("bf16", "bfloat16"), ("fp16", "float16")):
        config[name] = {**section(config, name), "enabled": dtype == wanted}
    if dtype != "float32":  # as precise as fsdp2: sums of gradients are never rounded
        config["data_types"] = {"grad_accum_dtype": "fp32", **section(config, "data_types")}
        config.setdefault("communication_data_type", "fp32")
    config["zero_optimization"] = _zero_optimization(section(config, "zero_optimization"), job, hidden_size)
    if left := list(_left_auto(config)):
        raise ConfigError(
            f"has `auto` where nothing decides the value: {', '.join(left)}",
            path="parallel.deepspeed",
            value=job.parallel.deepspeed,
            fix="write the value, or leave the key out",
        )
    return config


_NVME_SUB_GROUP = (
    10**8
)  # parameters of a rank read at a time, 4 buffers of 4 bytes each; DeepSpeed's default takes 16 GB
_THE_JOBS = ("optimizer", "scheduler", "train_batch_size", "bfloat16")  # the last is an old name of bf16


def _zero_optimization(given: Mapping[str, Any], job: Job, hidden_size: int | None) -> dict[str, Any]:
    """The section with its stage, its devices, and the sizes that Hugging Face derives from the model's width."""
    zero = {key: value for key, value in given.items() if key not in (*OFFLOADS, "cpu_offload")}
    zero["stage"] = zero_of(job).stage
    for key in OFFLOADS:
        device = device_of(given, key, job)
        if device != "none":
            zero[key] = {**section(given, key), "device": device}
        if device == "nvme":  # a folder of this run, because two runs in one would overwrite each other
            zero[key]["nvme_path"] = os.path.join(job.parallel.nvme or zero[key]["nvme_path"], job.name)
            zero.setdefault("sub_group_size", _NVME_SUB_GROUP)
    derived: dict[str, Any] = {"stage3_gather_16bit_weights_on_model_save": False}
    if hidden_size is not None:
        derived |= {
            "reduce_bucket_size": hidden_size**2,
            "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
            "stage3_param_persistence_threshold": 10 * hidden_size,
        }
    return zero | {key: value for key, value in derived.items() if zero.get(key) == AUTO}


def device_of(zero: Mapping[str, Any], key: str, job: Job) -> str:
    """`none`, `cpu` or `nvme`: where one of OFFLOADS goes."""
    if key == "offload_optimizer" and zero.get("cpu_offload") is True:  # its old name
        return "cpu"
    device = section(zero, key).get("device", "none")
    if device != AUTO:
        return str(device or "none")
    if job.parallel.offload not in OFFLOADS[key]:
        return "none"
    return "cpu" if job.parallel.nvme is None else "nvme"


def section(given: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A section as a dict; absent, null and `auto` are empty."""
    value = given.get(key)
    return value if isinstance(value, dict) else {}


def _left_auto(value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _left_auto(inner, f"{prefix}.{key}" if prefix else str(key))
    elif value == AUTO:
        yield prefix


def _unreadable(name: str, rule: str) -> ConfigError:
    known = ", ".join(SHORTHANDS)
    return ConfigError(rule, path="parallel.deepspeed", value=name, fix=f"name a DeepSpeed JSON or one of {known}")
