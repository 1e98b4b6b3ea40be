"""Invariants of the planner: ranks and coordinates are a bijection, memory is monotone, plans survive JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayswift.config.deepspeed_json import Zero
from rayswift.config.job import Job
from rayswift.errors import PlanError
from rayswift.planning.layout import Layout
from rayswift.planning.memory import estimate
from rayswift.planning.model_shape import ModelShape
from rayswift.planning.planner import Plan, plan
from rayswift.planning.slices import all_slices
from rayswift.planning.stages import STAGES_PER_RANK
from tests.job_cases import SEVERAL_ENGINES, gpu_cluster, make_job

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
        "model.dtype": draw(st.sampled_from(["float32", "bfloat16", "float16", "float8"])),
        "model.activation_checkpointing": draw(st.booleans()),
        "data.max_length": draw(st.integers(8, 8192)),
        "train.global_batch_size": 64,
        "train.micro_batch_size": draw(st.integers(1, 32)),
        "train.optimizer": draw(st.sampled_from(["adamw", "sgd"])),
        "train.momentum": draw(st.sampled_from([0.0, 0.9])),
        "adapter": draw(st.sampled_from([None, {"name": "lora", "rank": 8}])),
        "parallel.schedule": draw(st.sampled_from(sorted(STAGES_PER_RANK))),
        "parallel.offload": draw(st.sampled_from(["none", "optimizer", "parameters"])),
    }
    if changes["adapter"]:
        changes["model.quantization"] = draw(st.sampled_from([None, "nf4"]))
    if changes["parallel.offload"] != "none":
        changes["parallel.nvme"] = draw(st.sampled_from([None, "/nvme"]))
    return make_job(**changes)


zeros = st.none() | st.builds(
    Zero, stage=st.integers(1, 3), offload_optimizer=st.booleans(), offload_parameters=st.booleans(), nvme=st.booleans()
)


@st.composite
def mixtures(draw: st.DrawFn) -> ModelShape:
    shape = draw(shapes)
    experts = draw(st.integers(shape.num_params // 4, shape.num_params // 2))
    return replace(shape, num_experts=8, expert_params=experts, active_params=shape.num_params - 3 * experts // 4)


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


@given(shapes | mixtures(), jobs(), st.sampled_from(["max_length", "rank", "micro_batch_size"]), layouts, zeros)
def test_more_work_never_needs_less_memory(
    shape: ModelShape, job: Job, key: str, layout: Layout, zero: Zero | None
) -> None:
    if key == "micro_batch_size":
        layout = replace(layout, pp=1)
    smaller, larger = (estimate(shape, one, layout, zero) for one in (job, _grown_job(job, key)))
    if key == "micro_batch_size":  # fewer of them: whole gradients need not be held until the last
        assert (larger.logits, larger.activations) >= (smaller.logits, smaller.activations)
        return
    assert (larger.total, larger.host, larger.nvme) >= (smaller.total, smaller.host, smaller.nvme)
    if key == "max_length":
        assert larger.activations > smaller.activations


@given(shapes | mixtures(), jobs(), st.sampled_from(["hidden_size", "num_layers", "vocab_size", "num_params"]), zeros)
def test_a_larger_model_never_needs_less_memory(shape: ModelShape, job: Job, size: str, zero: Zero | None) -> None:
    changes = {size: 2 * getattr(shape, size)}
    if size == "num_params" and shape.active_params:
        changes |= {"active_params": 2 * shape.active_params, "expert_params": 2 * shape.expert_params}
    larger = estimate(replace(shape, **changes), job, Layout(), zero)
    smaller = estimate(shape, job, Layout(), zero)
    # Wider tables leave fewer of as many parameters in blocks, whose matrices alone are stored in 4 bits.
    slack = 0 if size == "num_params" or job.model.quantization is None else shape.num_params
    assert larger.total + larger.host + larger.nvme + slack >= smaller.total + smaller.host + smaller.nvme


@given(shapes | mixtures(), jobs(), st.integers(2, 16), zeros)
def test_more_shards_hold_less_state_each(shape: ModelShape, job: Job, shards: int, zero: Zero | None) -> None:
    few, many = (estimate(shape, job, Layout(dp_shard=n), zero) for n in (shards, 2 * shards))
    assert (many.total, many.host) <= (few.total, few.host)
    if zero is None or zero.stage == 3:
        assert many.parameters <= few.parameters // 2 + 2


@given(shapes | mixtures(), jobs(), st.sampled_from(["tp", "cp"]), st.integers(1, 4), zeros)
def test_a_model_that_is_cut_further_needs_no_more_for_any_part(
    shape: ModelShape, job: Job, axis: str, size: int, zero: Zero | None
) -> None:
    whole, cut = (estimate(shape, job, replace(Layout(dp_shard=2), **{axis: n}), zero) for n in (size, 2 * size))
    for name, num_bytes in cut.parts.items():
        assert num_bytes <= whole.parts[name] + 64, name  # of rounding
    assert (cut.host, cut.nvme) <= (whole.host, whole.nvme)


@given(shapes | mixtures(), layouts, st.sampled_from(sorted(STAGES_PER_RANK)), st.integers(1, 64))
def test_a_pipeline_has_every_layer_and_parameter_once(
    shape: ModelShape, layout: Layout, schedule: str, micro_batches: int
) -> None:
    layout = replace(layout, tp=1)
    slices = all_slices(shape, layout, schedule, micro_batches)
    assert len(slices) == layout.pp
    if shape.num_layers >= layout.pp * STAGES_PER_RANK[schedule]:
        assert sum(one.num_layers for one in slices) == shape.num_layers
        held = sum(one.dense + one.experts for one in slices)
        assert shape.num_params - 2 * layout.pp <= held <= shape.num_params
    assert sum(one.has_head for one in slices) == 1
    assert all(0 < one.in_flight <= micro_batches for one in slices)


@given(shapes, jobs(), layouts, zeros)
def test_the_total_is_the_sum_of_what_is_on_the_device(
    shape: ModelShape, job: Job, layout: Layout, zero: Zero | None
) -> None:
    memory = estimate(shape, job, layout, zero)
    assert memory.total == sum(memory.parts.values())
    assert min(*memory.parts.values(), memory.host, memory.nvme) >= 0
    assert not (memory.host and memory.nvme)


@given(shapes, jobs(), st.sampled_from([1, 2, 4, 8]))
def test_a_plan_survives_json_and_fits(shape: ModelShape, job: Job, devices: int) -> None:
    cluster = gpu_cluster(devices)
    try:
        made = plan(job, shape, cluster, engines=SEVERAL_ENGINES)
    except PlanError:
        return
    assert made.memory.total <= cluster.device_memory_bytes  # type: ignore[operator]
    assert made.layout.world_size == devices
    assert 0 <= made.bubble < 1
    assert Plan.from_plain(json.loads(json.dumps(made.to_plain()))) == made
