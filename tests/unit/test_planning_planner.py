"""The planner's choices, and every refusal with path, value, rule and a fix that works when it is followed."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace

import pytest

from rayswift.config import yamlfile
from rayswift.config.job import Job
from rayswift.errors import PlanError
from rayswift.planning.capability import Capability
from rayswift.planning.hardware import ClusterSpec
from rayswift.planning.layout import Layout
from rayswift.planning.model_shape import ModelShape
from rayswift.planning.planner import Plan, Rejected, plan
from tests.job_cases import CPU_BOX, ENGINES, GIB, SHAPE_8B, SMALL_SHAPE, gpu_cluster, make_job


def planned(job: Job, cluster: ClusterSpec = CPU_BOX, shape: ModelShape = SMALL_SHAPE) -> Plan:
    return plan(job, shape, cluster, engines=ENGINES)


def refusal(job: Job, cluster: ClusterSpec = CPU_BOX, shape: ModelShape = SMALL_SHAPE) -> str:
    with pytest.raises(PlanError) as caught:
        planned(job, cluster, shape)
    assert caught.value.exit_code == 3
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "cluster", "layout"),
    [
        ({}, CPU_BOX, Layout()),
        ({"cluster.workers": 4}, CPU_BOX, Layout(dp_shard=4)),
        ({"parallel.dp_replicate": 2, "cluster.workers": 4}, CPU_BOX, Layout(dp_replicate=2, dp_shard=2)),
        ({"parallel.dp_shard": 2}, CPU_BOX, Layout(dp_shard=2)),
        ({}, gpu_cluster(8), Layout(dp_shard=8)),
        ({"parallel.dp_replicate": 2}, gpu_cluster(8), Layout(dp_replicate=2, dp_shard=4)),
        ({"cluster.workers": 2}, gpu_cluster(8), Layout(dp_shard=2)),
    ],
)
def test_layout_of_the_workers(changes: dict[str, object], cluster: ClusterSpec, layout: Layout) -> None:
    made = planned(make_job(**changes), cluster)
    assert made.layout == layout
    assert made.engine == "fsdp2"
    assert made.placement.num_workers == layout.world_size


def test_gpu_workers_take_a_device_each_and_leave_cores_for_the_data() -> None:
    made = planned(make_job(**{"model.dtype": "bfloat16"}), gpu_cluster(8, num_cpus=96))
    assert made.placement.resources_per_worker == {"CPU": 2.0, "GPU": 1.0}
    assert made.placement.data_cpus == 80
    assert made.tokens_per_second is not None
    assert made.tokens_per_second > 0


def test_cpu_workers_leave_half_of_the_cores_for_the_data() -> None:
    made = planned(make_job(**{"cluster.workers": 4}), replace(CPU_BOX, num_cpus=2))
    assert made.placement.resources_per_worker == {"CPU": 0.25}
    assert made.placement.data_cpus == 1
    assert made.tokens_per_second is None


@pytest.mark.parametrize(
    ("changes", "cluster", "message"),
    [
        (
            {"cluster.workers": 9, "train.global_batch_size": 9},
            gpu_cluster(8),
            "cluster.workers=9 is more than the 8 cuda devices of the cluster; use at most 8, or add nodes",
        ),
        (
            {"cluster.workers": 33, "train.global_batch_size": 33},
            CPU_BOX,
            "cluster.workers=33 is too many for 8 CPUs; use at most 32",
        ),
        (
            {"cluster.workers": 3, "parallel.dp_replicate": 2},
            CPU_BOX,
            "cluster.workers=3 does not divide into dp_replicate*tp*pp*cp=2; use a multiple of 2",
        ),
        (
            {"cluster.workers": 4, "parallel.dp_shard": 3},
            CPU_BOX,
            "cluster.workers=4 is not the product of the parallel axes (3); "
            "set cluster.workers=3 or parallel.dp_shard=auto",
        ),
        (
            {"cluster.workers": 3, "train.global_batch_size": 8},
            CPU_BOX,
            "train.global_batch_size=8 does not split over 3 data ranks; use a multiple of 3, such as 9",
        ),
    ],
)
def test_refusals_name_path_value_rule_and_fix(changes: dict[str, object], cluster: ClusterSpec, message: str) -> None:
    assert refusal(make_job(**changes), cluster) == message


@pytest.mark.parametrize(
    ("changes", "missing", "fix"),
    [
        ({"parallel.tp": 2}, "tp", "parallel.tp=1 would work"),
        ({"parallel.pp": 2}, "pp", "parallel.pp=1 would work"),
        ({"parallel.cp": 2}, "cp", "parallel.cp=1 would work"),
        ({"model.dtype": "float16"}, "float16", "model.dtype=bfloat16 would work"),
        ({"parallel.tp": 2, "model.dtype": "float16"}, "float16, tp", "model.dtype=bfloat16 parallel.tp=1 would work"),
        ({"parallel.zero_stage": 2}, "zero_stage", "parallel.zero_stage=null would work"),
        ({"parallel.offload": "optimizer"}, "offload_optimizer", "parallel.offload=none would work"),
    ],
)
def test_what_no_engine_supports_is_refused_with_what_would_work(
    changes: dict[str, object], missing: str, fix: str
) -> None:
    job = make_job(**changes)
    text = refusal(job)
    assert text == f"parallel.engine=auto cannot run the job: engine fsdp2 does not support {missing}; {fix}"
    assert planned(followed(job, fix)).engine == "fsdp2"


def test_what_a_method_needs_is_matched_with_what_an_engine_supports() -> None:
    with pytest.raises(PlanError, match="does not support rollout"):
        plan(make_job(), SMALL_SHAPE, CPU_BOX, engines=ENGINES, needs=frozenset({"rollout"}))


def test_an_engine_that_cannot_is_kept_with_its_reason() -> None:
    engines = {"narrow": Capability(frozenset({"float32", "full"})), **ENGINES}
    made = plan(make_job(**{"cluster.workers": 2}), SMALL_SHAPE, CPU_BOX, engines=engines)
    assert made.engine == "fsdp2"
    assert made.rejected == (Rejected("engine narrow", "does not support dp_shard"),)
    assert "rejected    engine narrow: does not support dp_shard" in made.summary()


def followed(job: Job, fix: str) -> Job:
    """The job after a user typed the overrides that a fix names."""
    plain = job.model_dump(mode="json")
    for override in shlex.split(re.sub(" would (fit|work)( on .* devices)?$", "", fix)):
        key, value = override.split("=")
        section, field = key.split(".")
        plain[section] = {**(plain[section] or {}), field: yamlfile.value(value)}
    return Job.model_validate(plain)


@pytest.mark.parametrize(
    ("changes", "cluster", "shape"),
    [
        ({"train.micro_batch_size": 64, "train.global_batch_size": 64, "data.max_length": 8192},
         gpu_cluster(8), replace(SHAPE_8B, num_params=10**9)),
        ({"train.micro_batch_size": 1, "train.global_batch_size": 64, "data.max_length": 16384},
         gpu_cluster(8), SHAPE_8B),
        ({"model.dtype": "bfloat16", "train.global_batch_size": 64, "cluster.workers": 1}, gpu_cluster(64), SHAPE_8B),
        ({"parallel.dp_shard": 1, "train.global_batch_size": 64}, gpu_cluster(64), SHAPE_8B),
        ({"cluster.workers": 8, "data.max_length": 4096, "train.global_batch_size": 64},
         replace(CPU_BOX, memory_bytes=4 * GIB), replace(SMALL_SHAPE, num_params=10**8)),
    ],
)  # fmt: skip
def test_the_alternative_offered_really_fits(
    changes: dict[str, object], cluster: ClusterSpec, shape: ModelShape
) -> None:
    job = make_job(**changes)
    text = refusal(job, cluster, shape)
    assert re.match(r"model\.path=models/base needs .* per worker of Qwen3ForCausalLM with .*, but a worker has", text)
    fix = text.split("; ", 1)[1]
    assert " would fit" in fix
    if found := re.search("on ([0-9]+) devices$", fix):
        cluster = gpu_cluster(int(found[1]), num_cpus=12.0 * int(found[1]))
    made = planned(followed(job, fix), cluster, shape)
    assert made.memory.total <= 0.92 * made.capacity_bytes


def test_without_an_alternative_the_fix_says_so() -> None:
    text = refusal(make_job(), replace(CPU_BOX, memory_bytes=GIB), replace(SMALL_SHAPE, num_params=10**12))
    assert text.endswith("; use a smaller model, an adapter, or a larger device")


def test_plan_survives_json_with_its_total_spelled_out() -> None:
    made = replace(planned(make_job(**{"cluster.workers": 2})), rejected=(Rejected("engine x", "no tp"),))
    plain = json.loads(json.dumps(made.to_plain()))
    assert plain["memory"]["total"] == made.memory.total
    assert Plan.from_plain(plain) == made


def test_summary_names_engine_layout_and_memory() -> None:
    lines = planned(make_job(**{"cluster.workers": 2})).summary().splitlines()
    assert lines[0] == "engine      fsdp2 on cpu, dp_shard=2"
    assert lines[2].startswith("memory      ")
    assert lines[2].endswith("of 8.0 GiB per worker")
