"""Every layout's rules: what is refused names path, value, rule and what works; what is taken says why not others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rayswift.config.job import Job
from rayswift.errors import ConfigError, PlanError
from rayswift.planning.hardware import ClusterSpec, NodeSpec
from rayswift.planning.layout import Layout
from rayswift.planning.matching import Rejected
from rayswift.planning.model_plan import ModelPlan
from rayswift.planning.model_shape import ModelShape
from rayswift.planning.planner import Plan, plan
from tests.job_cases import CPU_BOX, GIB, SEVERAL_ENGINES, SHAPE_8B, SHAPE_30B_A3B, gpu_cluster, make_job

H100 = "NVIDIA H100 80GB HBM3"


def job_8b(**changes: object) -> Job:
    defaults = {"model.path": "Qwen/Qwen3-8B", "model.dtype": "bfloat16", "train.global_batch_size": 64}
    return make_job(**{**defaults, **changes})


def planned(
    job: Job,
    cluster: ClusterSpec | None = None,
    shape: ModelShape = SHAPE_8B,
    model_plan: ModelPlan | None = None,
    absent: frozenset[str] = frozenset(),
) -> Plan:
    found = model_plan or ModelPlan()
    cluster = cluster or gpu_cluster(64, num_cpus=768)
    return plan(job, shape, cluster, engines=SEVERAL_ENGINES, model_plan=lambda: found, absent=absent)


def refusal(job: Job, *args: object, error: type[Exception] = PlanError, **options: object) -> str:
    with pytest.raises(error) as caught:
        planned(job, *args, **options)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel.tp": 6, "cluster.workers": 6},
         "parallel.tp=6 does not divide num_kv_heads=8 of Qwen3-8B; use 1, 2, 4 or 8"),
        ({"parallel.tp": 16}, "parallel.tp=16 does not divide num_kv_heads=8 of Qwen3-8B; use 1, 2, 4 or 8"),
        ({"parallel.pp": 64},
         "parallel.pp=64 makes 64 stages of the 36 layers of Qwen3-8B; use at most 36"),
        ({"parallel.pp": 32, "parallel.schedule": "zbv"},
         "parallel.pp=32 makes 64 stages (2 on each worker with parallel.schedule=zbv) of the 36 layers of Qwen3-8B; "
         "use at most 18"),
        ({"parallel.ep": 2},
         "parallel.ep=2 has nothing to spread: Qwen3-8B is no mixture of experts; use parallel.ep=1"),
        ({"parallel.cp": 8, "parallel.tp": 8},
         "parallel.cp=8 does not divide the 4 attention heads that parallel.tp=8 leaves of Qwen3-8B; use 1, 2 or 4"),
        ({"parallel.cp": 64}, "parallel.cp=64 does not divide the 32 attention heads of Qwen3-8B; "
                              "use 1, 2, 4, 8, 16 or 32"),
        ({"parallel.cp": 4, "data.max_length": 34},
         "data.max_length=34 is not a multiple of parallel.cp=4, over whose workers a sequence is cut; use 32"),
        ({"model.dtype": "float8"}, "model.dtype=float8 needs a GPU that multiplies in FP8, such as H100, "
                                    "and A100-80GB does not; use model.dtype=bfloat16"),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_be_is_refused_with_what_can(changes: dict[str, object], message: str) -> None:
    assert refusal(job_8b(**changes)) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel.ep": 3, "cluster.workers": 48},
         "parallel.ep=3 does not divide the 128 experts of Qwen3-30B-A3B; use 1, 2, 4, 8, 16, 32, 64 or 128"),
        ({"parallel.ep": 5, "cluster.workers": 64},
         "parallel.ep=5 does not divide parallel.dp_shard=64, whose workers it spreads the experts over; "
         "use a divisor of 64, or more workers"),
        ({"parallel.tp": 3, "cluster.workers": 3},
         "parallel.tp=3 does not divide num_kv_heads=4 of Qwen3-30B-A3B; use 1, 2 or 4"),
    ],
)  # fmt: skip
def test_experts_have_rules_of_their_own(changes: dict[str, object], message: str) -> None:
    job = job_8b(**{"model.path": "Qwen/Qwen3-30B-A3B@main", **changes})
    assert refusal(job, shape=SHAPE_30B_A3B) == message


def test_tensor_parallelism_cuts_an_expert_unless_experts_are_spread() -> None:
    shape = replace(SHAPE_30B_A3B, expert_size=767)
    assert "does not divide moe_intermediate_size=767" in refusal(job_8b(**{"parallel.tp": 2}), shape=shape)
    spread = job_8b(**{"parallel.tp": 2, "parallel.ep": 8})
    assert planned(spread, gpu_cluster(64, gpu=H100), shape).layout == Layout(dp_shard=32, tp=2, ep=8)


@pytest.mark.parametrize(("axis", "kind"), [("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert")])
def test_an_architecture_without_a_plan_is_told(axis: str, kind: str) -> None:
    job = job_8b(**{f"parallel.{axis}": 2})
    text = refusal(job, shape=SHAPE_30B_A3B, model_plan=ModelPlan(tp=False, pp=False, ep=False))
    assert text.startswith(
        f"parallel.{axis}=2 has no way to cut Qwen3MoeForCausalLM: transformers has no {kind} parallel plan for it; "
        f"use parallel.{axis}=1; "
    )


def test_how_a_model_can_be_cut_is_looked_up_only_where_it_is_cut() -> None:
    def asked() -> ModelPlan:
        raise AssertionError("importing transformers takes seconds")

    for changes in ({}, {"parallel.cp": 2}, {"parallel.dp_replicate": 2}):
        plan(job_8b(**changes), SHAPE_8B, gpu_cluster(8), engines=SEVERAL_ENGINES, model_plan=asked)


@pytest.mark.parametrize(
    ("changes", "engine", "layout"),
    [
        ({"parallel.tp": 8}, "sharded", Layout(dp_shard=8, tp=8)),
        ({"parallel.tp": 2, "parallel.pp": 2}, "pipeline", Layout(dp_shard=16, tp=2, pp=2)),
        ({"parallel.cp": 4}, "sharded", Layout(dp_shard=16, cp=4)),
        ({"parallel.zero_stage": 2}, "zero", Layout(dp_shard=64)),
        ({"parallel.offload": "optimizer"}, "zero", Layout(dp_shard=64)),
        ({"parallel.offload": "parameters"}, "sharded", Layout(dp_shard=64)),
        ({"model.quantization": "nf4", "adapter.name": "lora"}, "sharded", Layout(dp_shard=64)),
        ({"parallel.engine": "pipeline"}, "pipeline", Layout(dp_shard=64)),
        ({"parallel.deepspeed": "zero2"}, "zero", Layout(dp_shard=64)),
    ],
)
def test_the_engine_is_the_preferred_one_that_can(changes: dict[str, object], engine: str, layout: Layout) -> None:
    made = planned(job_8b(**changes))
    assert (made.engine, made.layout) == (engine, layout)


def test_every_other_engine_is_kept_with_its_reason() -> None:
    made = planned(job_8b(), absent=frozenset({"deepspeed"}))
    assert made.rejected == (
        Rejected("engine pipeline", "could run it too; sharded is preferred"),
        Rejected("engine zero", "needs the package deepspeed, which is not installed"),
    )


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"parallel.zero_stage": 2, "parallel.engine": "sharded"}, "parallel.engine=auto would work"),
        ({"parallel.zero_stage": 2, "parallel.tp": 2}, "parallel.zero_stage=null would work"),
        ({"parallel.pp": 2, "model.dtype": "float16", "parallel.offload": "optimizer"},
         "parallel.offload=none would work"),
        ({"model.quantization": "nf4", "adapter.name": "lora", "parallel.tp": 2},
         "use parallel.dp_shard, not parallel.tp"),
        ({"parallel.engine": "sharded", "parallel.pp": 2}, "parallel.engine=auto would work"),
        ({"parallel.engine": "megatron"}, "parallel.engine=auto would work"),
    ],
)  # fmt: skip
def test_a_job_that_no_engine_runs_is_told_the_smallest_change(changes: dict[str, object], fix: str) -> None:
    text = refusal(job_8b(**changes))
    assert text.startswith("parallel.engine=")
    assert text.endswith(f"; {fix}")


def test_an_engine_whose_package_is_missing_is_told_how_to_get_it() -> None:
    text = refusal(job_8b(**{"parallel.zero_stage": 2}), absent=frozenset({"deepspeed"}))
    assert text.endswith("not installed; install it: pip install 'rayswift[deepspeed]'")


def test_circumstances_matter_only_where_an_engine_names_them() -> None:
    tied = replace(SHAPE_8B, tied=True)
    assert planned(job_8b(), shape=tied).engine == "sharded"
    text = refusal(job_8b(**{"parallel.pp": 2}), shape=tied)
    assert "engine pipeline cannot combine pp, tied: one table would be on two stages" in text
    assert text.endswith("; use parallel.tp, not parallel.pp")


def test_a_deepspeed_json_that_contradicts_the_job_is_refused_before_anything_starts() -> None:
    job = job_8b(**{"parallel.deepspeed": "zero3", "parallel.zero_stage": 2})
    assert "stage=3 contradicts parallel.zero_stage=2" in refusal(job, error=ConfigError)


def test_expert_parallelism_alone_asks_for_as_many_workers_on_a_cpu() -> None:
    shape = replace(SHAPE_30B_A3B, hidden_size=64, num_params=10**6, active_params=6 * 10**5, expert_params=5 * 10**5,
                    vocab_size=512)  # fmt: skip
    assert planned(make_job(**{"parallel.ep": 4}), CPU_BOX, shape).layout == Layout(dp_shard=4, ep=4)


def test_fp8_is_refused_where_nothing_computes_in_it_and_may_run_on_what_is_not_known() -> None:
    assert "and cpu does not" in refusal(job_8b(**{"model.dtype": "float8"}), CPU_BOX)
    assert planned(job_8b(**{"model.dtype": "float8"}), gpu_cluster(8, gpu=H100)).engine == "sharded"
    unknown = replace(gpu_cluster(8), gpu=None)
    assert planned(job_8b(**{"model.dtype": "float8"}), unknown).tokens_per_second is None


def test_a_pipeline_waits_and_the_plan_says_how_long() -> None:
    made = planned(job_8b(**{"parallel.pp": 4, "train.micro_batch_size": 1}), gpu_cluster(8, num_cpus=96))
    flat = planned(job_8b(**{"train.micro_batch_size": 1}), gpu_cluster(8, num_cpus=96))
    assert made.bubble == 3 / (32 + 3)  # (p - 1) / (m + p - 1)
    assert made.tokens_per_second == pytest.approx((1 - made.bubble) * (flat.tokens_per_second or 0))
    assert "pipeline    4 workers in a row, each waits 9% of a step" in made.summary()
    two_each = planned(
        job_8b(**{"parallel.pp": 4, "train.micro_batch_size": 1, "parallel.schedule": "interleaved_1f1b"}),
        gpu_cluster(8, num_cpus=96),
    )
    assert two_each.bubble == 3 / (2 * 32 + 3)


def test_fewer_micro_batches_than_stages_are_warned_of() -> None:
    made = planned(job_8b(**{"parallel.pp": 4, "train.micro_batch_size": 16}), gpu_cluster(8, num_cpus=96))
    assert made.warnings == (
        "2 micro-batches for 4 stages leave each worker idle for 60% of a step; "
        "lower train.micro_batch_size or raise train.global_batch_size",
    )
    assert f"warning     {made.warnings[0]}" in made.summary()


def nodes(shape: str, count: int) -> ClusterSpec:
    found = tuple(NodeSpec(f"n{i}", 8, 96, 512 * GIB, shape) for i in range(count))
    return replace(gpu_cluster(8 * count, num_cpus=96.0 * count, gpu=H100), nodes=found, num_nodes=count)


def test_too_few_tokens_to_hide_the_gathers_are_warned_of() -> None:
    job = job_8b(**{"data.max_length": 2048, "train.micro_batch_size": 2, "model.activation_checkpointing": True})
    (warning,) = planned(job, nodes("h100-8x80", 2)).warnings  # 50 GB/s for each worker
    assert warning.startswith("4.10k tokens per worker and micro-batch are fewer than the 9.89k whose computation")
    assert not planned(job, nodes("h100-8x80", 1)).warnings  # NVLink hides them from 1.1k tokens on
    assert not planned(job, gpu_cluster(16, num_cpus=192)).warnings  # nothing is known of the network
    replicated = job_8b(**{"parallel.dp_replicate": 2, "data.max_length": 2048, "train.micro_batch_size": 1})
    assert not planned(replicated, nodes("h100-8x80", 2)).warnings  # a shard group is one node


def test_what_is_offloaded_must_fit_the_host() -> None:
    small = replace(gpu_cluster(8), memory_bytes=64 * GIB)
    text = refusal(job_8b(**{"parallel.offload": "parameters"}), small)
    assert text.startswith("parallel.offload=parameters moves 15.3 GiB per worker to the host with dp_shard=8, "
                           "but a worker's share of its node's memory is 7.4 GiB; ")  # fmt: skip
    made = planned(job_8b(**{"parallel.offload": "parameters"}), gpu_cluster(8))
    assert "host        15.3 GiB of 64.0 GiB per worker" in made.summary()
    disk = planned(job_8b(**{"parallel.offload": "parameters", "parallel.nvme": "/nvme"}), small)
    assert "nvme        17.2 GiB per worker" in disk.summary()


def test_on_a_cpu_the_host_is_the_device() -> None:
    shape = replace(SHAPE_8B, num_params=10**9)
    job = make_job(**{"parallel.offload": "parameters"})
    assert "needs 16.6 GiB per worker" in refusal(job, replace(CPU_BOX, memory_bytes=17 * GIB), shape)


@pytest.mark.parametrize(
    ("changes", "cluster", "fix"),
    [
        ({"data.max_length": 2048, "train.micro_batch_size": 16, "train.global_batch_size": 1024},
         gpu_cluster(64, num_cpus=768),
         "train.micro_batch_size=1 would fit"),
        ({"data.max_length": 16384}, gpu_cluster(64, num_cpus=768),
         "train.micro_batch_size=1 model.activation_checkpointing=true would fit"),
        ({"data.max_length": 2048, "cluster.workers": 1}, gpu_cluster(8),
         "train.micro_batch_size=1 model.activation_checkpointing=true cluster.workers=4 would fit"),
        ({"data.max_length": 65536, "data.packing": False}, gpu_cluster(8),
         "train.micro_batch_size=1 model.activation_checkpointing=true parallel.tp=8 would fit"),
        ({"data.max_length": 2048}, gpu_cluster(1),
         "train.micro_batch_size=1 model.activation_checkpointing=true parallel.offload=parameters would fit"),
        ({"data.max_length": 2048}, replace(gpu_cluster(1), memory_bytes=32 * GIB),
         "train.micro_batch_size=1 model.activation_checkpointing=true adapter.name=lora would fit"),
        ({"data.max_length": 2048}, replace(gpu_cluster(1), memory_bytes=32 * GIB, device_memory_bytes=16 * GIB),
         "train.micro_batch_size=1 model.activation_checkpointing=true adapter.name=lora model.quantization=nf4 "
         "would fit"),
    ],
)  # fmt: skip
def test_the_first_alternative_that_fits_is_named(changes: dict[str, object], cluster: ClusterSpec, fix: str) -> None:
    assert refusal(job_8b(**changes), cluster).split("; ", 1)[1] == fix


def test_what_no_setting_mends_names_the_cluster_that_would_do() -> None:
    shape = replace(SHAPE_8B, num_params=12 * 10**11, num_layers=720)
    text = refusal(job_8b(**{"train.global_batch_size": 512}), gpu_cluster(8), shape)
    assert text.endswith(
        "; cluster.workers=512 train.micro_batch_size=1 model.activation_checkpointing=true would fit on 512 devices"
    )
