"""Memory on every axis, against published figures and against sums done by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rayswift.config.deepspeed_json import Zero
from rayswift.config.job import Job
from rayswift.planning.layout import Layout
from rayswift.planning.memory import MemoryEstimate, estimate
from rayswift.planning.model_shape import ModelShape
from rayswift.planning.slices import all_slices, pipeline_bubble
from tests.job_cases import SHAPE_8B, SHAPE_30B_A3B, make_job

P = SHAPE_8B.num_params
TABLE = SHAPE_8B.vocab_size * SHAPE_8B.hidden_size


def job(**changes: object) -> Job:
    return make_job(
        **{"model.dtype": "bfloat16", "train.global_batch_size": 64, "train.micro_batch_size": 1, **changes}
    )


def states(memory: MemoryEstimate) -> int:
    return memory.parameters + memory.gradients + memory.optimizer


@pytest.mark.parametrize(("stage", "gigabytes"), [(1, 60 + 0.94), (2, 30 + 1.41), (3, 1.88)])
def test_zero_stages_hold_what_the_paper_says_but_for_gradients_in_float32(stage: int, gigabytes: float) -> None:
    """arXiv 1910.02054, figure 1 is 4 + 12/N, 2 + 14/N and 16/N bytes: of 7.5B parameters on 64 GPUs, 31.4, 16.6, 1.88.

    There gradients have 2 bytes and here 4, and parameters and gradients have 4 each in float32.
    """
    shape = replace(SHAPE_8B, num_params=7_500_000_000)
    memory = estimate(shape, make_job(**{"train.global_batch_size": 64}), Layout(dp_shard=64), Zero(stage))
    assert states(memory) / 1e9 == pytest.approx(gigabytes, rel=0.01)
    mixed = estimate(shape, job(), Layout(dp_shard=64), Zero(stage))
    assert mixed.parameters == 15_000_000_000 // (64 if stage == 3 else 1)
    assert mixed.optimizer == 12 * 7_500_000_000 // 64


def test_fsdp_holds_whole_gradients_until_the_last_micro_batch_of_a_step() -> None:
    once = estimate(SHAPE_8B, job(), Layout(dp_shard=64))
    accumulating = estimate(SHAPE_8B, job(**{"train.global_batch_size": 128}), Layout(dp_shard=64))
    assert once.gradients == 4 * P // 64
    assert accumulating.gradients == 4 * P
    assert accumulating.parameters == once.parameters


def test_tensor_parallelism_cuts_everything_but_an_embedding_that_is_no_head() -> None:
    whole, cut = (estimate(SHAPE_8B, job(**{"train.global_batch_size": 1}), Layout(tp=tp)) for tp in (1, 8))
    assert cut.parameters == pytest.approx(4 * ((P - TABLE) / 8 + TABLE))
    assert cut.logits == whole.logits // 8
    assert cut.activations / whole.activations == pytest.approx((10 + 24 / 8) / 34, rel=0.01)
    tied = replace(SHAPE_8B, tied=True, num_params=P - TABLE)
    assert estimate(tied, job(), Layout(tp=8)).parameters == pytest.approx(4 * (P - TABLE) / 8)


def test_a_pipeline_gives_each_rank_its_layers_and_the_ends_their_tables() -> None:
    slices = all_slices(SHAPE_8B, Layout(pp=4), "1f1b", 8)
    assert [one.num_layers for one in slices] == [9, 9, 9, 9]
    assert [one.in_flight for one in slices] == [4, 3, 2, 1]
    assert [one.has_head for one in slices] == [False, False, False, True]
    blocks = (P - 2 * TABLE) // 4
    assert [one.dense for one in slices] == [blocks + TABLE, blocks, blocks, blocks + TABLE]
    memory = estimate(SHAPE_8B, job(), Layout(pp=4))
    assert memory.parameters == 4 * (blocks + TABLE)


def test_a_v_has_both_ends_on_the_first_rank() -> None:
    first, *_, last = all_slices(SHAPE_8B, Layout(pp=4), "zbv", 8)
    assert (first.has_head, last.has_head) == (True, False)
    assert first.dense - first.dense_blocks == 2 * TABLE
    assert {one.in_flight for one in all_slices(SHAPE_8B, Layout(pp=4), "zbv", 8)} == {4}


def test_interleaved_stages_keep_more_micro_batches_in_flight() -> None:
    plain, interleaved = (all_slices(SHAPE_8B, Layout(pp=4), name, 8)[0] for name in ("1f1b", "interleaved_1f1b"))
    assert interleaved.in_flight == (3 * 4 - 1) / 2 > plain.in_flight
    assert all_slices(SHAPE_8B, Layout(pp=4), "interleaved_1f1b", 2)[0].in_flight == 2  # there are no more


def test_what_does_not_divide_falls_to_the_stages_in_the_middle() -> None:
    layers = [one.num_layers for one in all_slices(SHAPE_8B, Layout(pp=5), "1f1b", 8)]
    assert layers == [7, 8, 7, 7, 7]


def test_experts_are_shared_by_all_data_ranks_however_they_are_spread() -> None:
    wide, spread = (estimate(SHAPE_30B_A3B, job(), Layout(dp_shard=64, ep=ep)) for ep in (1, 8))
    assert wide.parameters == pytest.approx(spread.parameters, rel=1e-6)
    experts_of_two_blocks = 2 * 2 * SHAPE_30B_A3B.expert_params / SHAPE_30B_A3B.num_layers
    assert wide.gathered - spread.gathered == pytest.approx(experts_of_two_blocks * 7 / 8, rel=1e-3)


def test_a_mixture_keeps_a_token_for_every_expert_it_goes_to() -> None:
    assert SHAPE_30B_A3B.experts_per_token == 8
    dense = replace(SHAPE_30B_A3B, num_experts=1, expert_params=0)
    assert estimate(SHAPE_30B_A3B, job(), Layout()).activations > 1.5 * estimate(dense, job(), Layout()).activations


def test_a_base_in_four_bits_needs_about_half_a_byte_a_parameter() -> None:
    plain, packed = (
        estimate(SHAPE_8B, job(**{"adapter.name": "lora", "model.quantization": kind}), Layout(dp_shard=8))
        for kind in (None, "nf4")
    )
    saved = (P - 2 * TABLE) * (2 - 0.516) / 8
    assert plain.parameters - packed.parameters == pytest.approx(saved, rel=0.001)
    assert packed.gathered < plain.gathered


def test_context_parallelism_shards_states_and_cuts_tokens() -> None:
    whole, cut = (estimate(SHAPE_8B, job(**{"data.packing": False}), Layout(cp=cp)) for cp in (1, 4))
    assert cut.optimizer == whole.optimizer // 4
    assert (cut.activations, cut.logits) == (whole.activations // 4, whole.logits // 4)


def test_masks_of_packed_documents_grow_with_the_square_of_the_length() -> None:
    with_masks, without = (
        estimate(SHAPE_8B, job(**{"data.max_length": 8192, "data.packing": packing}), Layout())
        for packing in (True, False)
    )
    assert with_masks.activations - without.activations == 8192**2


@pytest.mark.parametrize(
    ("zero", "on_device", "on_host"),
    [
        (Zero(3), {"parameters", "gradients", "optimizer"}, 0),
        (Zero(2, offload_optimizer=True), {"parameters"}, (12 + 4) * P // 64),
        (Zero(3, offload_optimizer=True, offload_parameters=True), set(), (12 + 4 + 2) * P // 64),
        (Zero(1, offload_optimizer=True), {"parameters", "gradients"}, (12 + 4) * P // 64),
    ],
)
def test_what_zero_offloads_lies_on_the_host(zero: Zero, on_device: set[str], on_host: int) -> None:
    memory = estimate(SHAPE_8B, job(), Layout(dp_shard=64), zero)
    kept = {name for name in ("parameters", "gradients", "optimizer") if memory.parts[name]}
    assert (kept, memory.nvme) == (on_device, 0)
    assert memory.host == pytest.approx(on_host, abs=4)


def test_what_fsdp_offloads_lies_on_the_host_or_its_disk() -> None:
    changes = {"parallel.offload": "parameters"}
    memory = estimate(SHAPE_8B, job(**changes), Layout(dp_shard=64))
    assert (states(memory), memory.host) == (0, 16 * P // 64)
    disk = estimate(SHAPE_8B, job(**changes, **{"parallel.nvme": "/nvme"}), Layout(dp_shard=64))
    assert (disk.host, disk.nvme, disk.total) == (0, memory.host, memory.total)
    accumulating = estimate(SHAPE_8B, job(**changes, **{"train.global_batch_size": 128}), Layout(dp_shard=64))
    assert accumulating.gradients == 4 * P  # summed up on the device first


def test_the_bubble_is_that_of_the_papers() -> None:
    assert pipeline_bubble(Layout(), "1f1b", 1) == 0
    assert pipeline_bubble(Layout(pp=4), "1f1b", 8) == 3 / 11
    assert pipeline_bubble(Layout(pp=4), "zbv", 8) == 3 / 19


def test_the_worker_that_needs_most_is_the_one_that_counts() -> None:
    """Many micro-batches in flight make the first rank the largest, many logits the last."""
    wide = ModelShape("Any", 1024, 8, 8, 8, 1_000_000, 4096, 10**9)
    assert estimate(wide, job(**{"data.max_length": 2048}), Layout(pp=2)).logits > 0
    narrow = replace(wide, vocab_size=1000, num_layers=64)
    assert estimate(narrow, job(**{"data.max_length": 2048}), Layout(pp=2)).logits == 0
