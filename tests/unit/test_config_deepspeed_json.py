"""A user's DeepSpeed JSON: `auto` filled as Hugging Face does it, every contradiction with the job told at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayswift.config.deepspeed_check import check, contradictions
from rayswift.config.deepspeed_json import SHORTHANDS, Zero, deepspeed_config, zero_of
from rayswift.config.job import Job
from rayswift.errors import ConfigError
from tests.job_cases import make_job

# The JSON of transformers' documentation, its scheduler left out.
HF_ZERO3: dict[str, Any] = {
    "fp16": {
        "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "zero_optimization": {
        "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True}, "overlap_comm": True, "contiguous_gradients": True,
        "sub_group_size": 1e9, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
}  # fmt: skip


def job_with(tmp_path: Path, given: Any, **changes: Any) -> Job:
    """A job whose `parallel.deepspeed` is a file of this content."""
    path = tmp_path / "ds.json"
    path.write_text(given if isinstance(given, str) else json.dumps(given))
    return make_job(**({"parallel.deepspeed": str(path)} | changes))


def test_auto_is_filled_from_the_job_and_the_models_width(tmp_path: Path) -> None:
    job = job_with(
        tmp_path, HF_ZERO3 | {"custom": {"kept": 1}}, **{"model.dtype": "bfloat16", "train.global_batch_size": 48}
    )
    check(job, 4)
    config = deepspeed_config(job, data_size=4, hidden_size=64)
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 3
    assert config["gradient_clipping"] == 1.0
    assert (config["bf16"], config["fp16"]["enabled"], config["fp16"]["hysteresis"]) == ({"enabled": True}, False, 2)
    zero = config["zero_optimization"]
    assert zero["reduce_bucket_size"] == 64 * 64
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 64 * 64)
    assert zero["stage3_param_persistence_threshold"] == 640
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert config["custom"] == {"kept": 1}
    assert not {"optimizer", "scheduler", "train_batch_size"} & config.keys()


def test_what_the_job_decides_may_be_said_again(tmp_path: Path) -> None:
    given = {
        "train_batch_size": 8, "gradient_accumulation_steps": 1, "gradient_clipping": 0, "bf16": {"enabled": False},
        "optimizer": {"type": "SGD", "params": {"lr": 1e-4, "momentum": 0.9}},
        "zero_optimization": {"stage": 2},
    }  # fmt: skip
    settings = {"train.optimizer": "sgd", "train.momentum": 0.9, "train.max_grad_norm": None, "parallel.zero_stage": 2}
    assert contradictions(job_with(tmp_path, given, **settings), 2) == []


def test_every_contradiction_is_told_at_once_with_both_values(tmp_path: Path) -> None:
    given = {
        "train_batch_size": 7, "gradient_accumulation_steps": 9, "gradient_clipping": 0.3, "fp16": {"enabled": True},
        "optimizer": {"type": "Lion", "params": {"lr": 5, "betas": [0.9, 0.95], "eps": 1e-6}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}, "gradient_allreduce_op": "sum",
        "tensor_parallel": {"autotp_size": 2},
        "zero_optimization": {"stage": 2, "offload_param": {"device": "nvme", "nvme_path": "/a"}},
    }  # fmt: skip
    settings = {"parallel.zero_stage": 3, "parallel.offload": "optimizer", "parallel.nvme": "/b"}
    job = job_with(tmp_path, given, **settings)
    with pytest.raises(ConfigError) as caught:
        check(job, 2)
    lines = [line.removeprefix("  - ").split(";")[0] for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        "train_batch_size=7 contradicts train.global_batch_size=8",
        "gradient_accumulation_steps=9 contradicts train.global_batch_size / train.micro_batch_size / 2 ranks=1",
        "gradient_clipping=0.3 contradicts train.max_grad_norm=1.0",
        "optimizer.type=Lion contradicts train.optimizer=adamw",
        "optimizer.params.lr=5 contradicts train.lr=0.0001",
        "optimizer.params.betas=[0.9, 0.95] contradicts train.betas=[0.9, 0.999]",
        "optimizer.params.eps=1e-06 contradicts train.optimizer=adamw with eps=1e-08",
        "scheduler.type=WarmupLR contradicts train.schedule=cosine: leave the section out",
        "fp16.enabled=true contradicts model.dtype=float32",
        "zero_optimization.stage=2 contradicts parallel.zero_stage=3",
        "zero_optimization.stage=2 contradicts offloading parameters, which needs stage 3",
        "zero_optimization.stage=2 contradicts offloading to NVMe, which needs stage 3",
        "zero_optimization.offload_optimizer.device=none contradicts parallel.offload=optimizer",
        "zero_optimization.offload_param.nvme_path=/a contradicts parallel.nvme=/b",
        "gradient_allreduce_op=sum contradicts the engine's own gradient_allreduce_op=mean",
        "tensor_parallel.autotp_size=2 contradicts parallel.tp, which the deepspeed engine has not",
    ]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"parallel.deepspeed": "zero3_offload", "parallel.offload": "optimizer", "parallel.nvme": "/a"},
            "nothing to NVMe",
        ),
        ({"parallel.zero_stage": 1, "parallel.offload": "parameters"}, "offloading parameters, which needs stage 3"),
        ({"parallel.deepspeed": "zero0"}, "stage=0, which is plain data parallelism, contradicts parallel.engine"),
        ({"parallel.deepspeed": "zero2_offload", "parallel.offload": "parameters"}, "offload_param.device=none"),
    ],
)
def test_a_job_without_a_file_is_checked_too(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=r"^parallel") as caught:
        check(make_job(**settings))
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "zero"),
    [
        ({}, Zero(3)),
        ({"parallel.zero_stage": 1}, Zero(1)),
        ({"parallel.offload": "optimizer"}, Zero(3, offload_optimizer=True)),
        ({"parallel.offload": "parameters", "parallel.nvme": "/a"}, Zero(3, True, True, True)),
        ({"parallel.deepspeed": "zero2_offload"}, Zero(2, offload_optimizer=True)),
        ({"parallel.deepspeed": "zero3_offload"}, Zero(3, offload_optimizer=True, offload_parameters=True)),
    ],
)
def test_stage_and_offload_are_known_without_deepspeed(settings: dict[str, Any], zero: Zero) -> None:
    assert zero_of(make_job(**settings)) == zero


def test_a_json_decides_stage_and_offload(tmp_path: Path) -> None:
    assert zero_of(job_with(tmp_path, HF_ZERO3)) == Zero(3, True, True)
    assert zero_of(job_with(tmp_path, {})) == Zero(0)
    auto = {"zero_optimization": {"stage": "auto", "offload_optimizer": {"device": "auto"}}}
    assert zero_of(job_with(tmp_path, auto)) == Zero(3)
    wanted = {"parallel.offload": "optimizer", "parallel.nvme": "/a", "parallel.zero_stage": 3}
    assert zero_of(job_with(tmp_path, auto, **wanted)) == Zero(3, offload_optimizer=True, nvme=True)


def test_two_runs_do_not_share_a_folder_on_nvme() -> None:
    job = make_job(**{"parallel.offload": "parameters", "parallel.nvme": "/fast", "name": "mine"})
    zero = deepspeed_config(job, data_size=2, hidden_size=None)["zero_optimization"]
    assert zero["offload_param"] == zero["offload_optimizer"] == {"device": "nvme", "nvme_path": "/fast/mine"}


@pytest.mark.parametrize("name", SHORTHANDS)
def test_every_shorthand_stands_for_a_config(name: str) -> None:
    assert deepspeed_config(make_job(**{"parallel.deepspeed": name}), data_size=1, hidden_size=8)["zero_optimization"]


@pytest.mark.parametrize(
    ("content", "told"),
    [("{", "is not JSON"), ("[1]", "is not a JSON object"), (None, "cannot be read: No such file")],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, content: str | None, told: str) -> None:
    job = make_job(**{"parallel.deepspeed": str(tmp_path / "no.json")})
    if content is not None:
        job = job_with(tmp_path, content)
    with pytest.raises(ConfigError, match=told) as caught:
        zero_of(job)
    assert "zero3_offload" in str(caught.value)


def test_an_auto_that_nothing_decides_is_named(tmp_path: Path) -> None:
    given = {"zero_optimization": {"stage": 3, "sub_group_size": "auto", "reduce_bucket_size": "auto"}}
    with pytest.raises(ConfigError, match=r"zero_optimization.sub_group_size, zero_optimization.reduce_bucket_size"):
        deepspeed_config(job_with(tmp_path, given), data_size=1, hidden_size=None)
