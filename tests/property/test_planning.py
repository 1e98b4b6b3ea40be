"""Invariants of the planner: ranks and coordinates are a bijection, memory is monotone, plans survive JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayswift.config.job import Job
from rayswift.errors import PlanError
from rayswift.planning.layout import Layout
from rayswift.planning.memory import estimate
from rayswift.planning.model_shape import ModelShape
from rayswift.planning.planner import Plan, plan
from tests.job_cases import ENGINES, gpu_cluster, make_job

sizes = st.integers(1, 4)
layouts = st.builds(Layout, dp_replicate=sizes, dp_shard=sizes, cp=st.integers(1, 2), tp=sizes, pp=st.integers(1, 3))
shapes = st.builds(
    ModelShape,
    architecture=st.just("Any"),
    hidden_size=st.integers(8, 8192),
    num_layers=st.integers(1, 80),
    num_heads=st.just(8),
    num_kv_heads=st.just(8),
    vocab_size=st.integers(16, 200_000),
    intermediate_size=st.integers(8, 30_000),
    num_params=st.integers(10**4, 10**11),
)


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    changes = {
        "model.dtype": draw(st.sampled_from(["float32", "bfloat16"])),
        "model.activation_checkpointing": draw(st.booleans()),
        "data.max_length": draw(st.integers(8, 8192)),
        "train.global_batch_size": 64,
        "train.micro_batch_size": draw(st.integers(1, 32)),
        "train.optimizer": draw(st.sampled_from(["adamw", "sgd"])),
        "train.momentum": draw(st.sampled_from([0.0, 0.9])),
        "adapter": draw(st.sampled_from([None, {"name": "lora", "rank": 8}])),
    }
    return make_job(**changes)


@given(layouts)
def test_ranks_and_coordinates_are_a_bijection(layout: Layout) -> None:
    places = [layout.coordinate(rank) for rank in range(layout.world_size)]
    assert len({tuple(sorted(place.items())) for place in places}) == layout.world_size
    for place in places:
        assert all(0 <= place[name] < size for name, size in layout.axes)


@given(layouts)
def test_tensor_parallel_ranks_are_neighbours(layout: Layout) -> None:
    for rank in range(layout.world_size):
        place = layout.coordinate(rank)
        if place["tp"]:
            assert layout.coordinate(rank - 1) == {**place, "tp": place["tp"] - 1}


@given(layouts)
def test_each_data_rank_is_read_by_one_whole_model(layout: Layout) -> None:
    readers = Counter(layout.data_rank(rank) for rank in range(layout.world_size))
    assert readers == dict.fromkeys(range(layout.data_size), layout.cp * layout.tp * layout.pp)


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    with pytest.raises(AssertionError, match="of 4"):
        Layout(dp_shard=4).coordinate(rank)


def _grown_job(job: Job, key: str) -> Job:
    """The job with one size doubled; the same job where the size does not apply."""
    if key == "max_length":
        return job.model_copy(update={"data": job.data.model_copy(update={key: 2 * job.data.max_length})})
    if key == "rank":
        bigger = job.adapter and job.adapter.model_copy(update={"rank": 2 * job.adapter.rank})
        return job.model_copy(update={"adapter": bigger})
    return job.model_copy(update={"train": job.train.model_copy(update={key: 2 * job.train.micro_batch_size})})


@given(shapes, jobs(), st.sampled_from(["max_length", "rank", "micro_batch_size"]), st.integers(1, 8))
def test_more_work_never_needs_less_memory(shape: ModelShape, job: Job, key: str, shards: int) -> None:
    layout = Layout(dp_shard=shards)
    smaller, larger = estimate(shape, job, layout), estimate(shape, _grown_job(job, key), layout)
    assert larger.total >= smaller.total
    if key != "rank":
        assert larger.activations > smaller.activations


@given(shapes, jobs(), st.sampled_from(["hidden_size", "num_layers", "vocab_size", "num_params"]))
def test_a_larger_model_never_needs_less_memory(shape: ModelShape, job: Job, size: str) -> None:
    layout = Layout(dp_shard=1)
    assert estimate(replace(shape, **{size: 2 * getattr(shape, size)}), job, layout).total >= (
        estimate(shape, job, layout).total
    )


@given(shapes, jobs(), st.integers(2, 16))
def test_more_shards_hold_less_state_each(shape: ModelShape, job: Job, shards: int) -> None:
    few, many = estimate(shape, job, Layout(dp_shard=shards)), estimate(shape, job, Layout(dp_shard=2 * shards))
    assert many.total <= few.total
    assert many.parameters <= few.parameters // 2 + 1


@given(shapes, jobs())
def test_the_total_is_the_sum_of_the_parts(shape: ModelShape, job: Job) -> None:
    memory = estimate(shape, job, Layout())
    assert memory.total == sum(getattr(memory, field.name) for field in fields(memory))


@given(shapes, jobs(), st.sampled_from([1, 2, 4, 8]))
def test_a_plan_survives_json_and_fits(shape: ModelShape, job: Job, devices: int) -> None:
    cluster = gpu_cluster(devices)
    try:
        made = plan(job, shape, cluster, engines=ENGINES)
    except PlanError:
        return
    assert made.memory.total <= cluster.device_memory_bytes  # type: ignore[operator]
    assert made.layout.world_size == devices
    assert Plan.from_plain(json.loads(json.dumps(made.to_plain()))) == made
