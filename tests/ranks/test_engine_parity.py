"""The same training run under every layout, compared with one bare torch loop over unpacked documents.

A slice of what `make parity` measures: the rows are in `tests/parity_rows.py`.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from rayswift.planning.layout import Layout
from tests.engine_cases import build, take_step
from tests.job_cases import make_job
from tests.parity import LR, Outcome, difference
from tests.parity_rows import CASES, LAYOUTS, SLICE, STEPS, expected, train_cases
from tests.ranks.forked import RankFailed, run_ranks


@cache
def outcomes(layout: str) -> list[dict[str, Outcome]]:
    """Each rank's outcomes; a layout's ranks are forked once for all its cases."""
    return run_ranks(train_cases, LAYOUTS[layout].layout.world_size, layout, SLICE[layout])


@pytest.mark.parametrize(("layout", "case"), [(layout, case) for layout, cases in SLICE.items() for case in cases])
def test_a_layout_computes_the_run_of_a_bare_loop(layout: str, case: str) -> None:
    found = difference([rank[case] for rank in outcomes(layout)], expected(layout, case))
    assert found.is_within, found


def test_every_layout_is_in_the_slice_and_its_rows_differ() -> None:
    assert {name for name, arrangement in LAYOUTS.items() if arrangement.engine != "deepspeed"} == SLICE.keys()
    packed = [case.packing and case.micro_batches > 1 for case in CASES.values()]
    assert sum(packed) * 2 == len(packed), "half of the cases accumulate packed rows"


def test_a_run_that_is_not_the_same_is_seen() -> None:
    """What the comparison says of another clipping, and of losses that are no numbers."""
    other = difference([expected("one process", "packed")], expected("one process", "tied"))
    assert not other.is_within
    wanted = expected("one process", "packed")
    assert difference([wanted], wanted).is_within
    broken = Outcome([(float("nan"), norm) for _, norm in wanted.steps], wanted.eval_loss, wanted.weights)
    assert not difference([broken], wanted).is_within


def test_the_reference_learns_and_its_steps_differ() -> None:
    """What the layouts are compared with is a run in which something happens."""
    steps = expected("one process", "packed").steps
    assert len({round(loss, 3) for loss, _ in steps}) == STEPS
    assert max(norm for _, norm in steps) > 0.5, "the gradient is clipped"


def bfloat16_losses(rank: int, layout: Layout, case: str) -> list[float]:
    engine = build(CASES[case].job(**{"model.dtype": "bfloat16"}), layout)
    return [take_step(engine, number, micro_batches=2, lr=LR).loss for number in range(STEPS)]


@pytest.mark.parametrize("case", ["packed", "lora"])
def test_bfloat16_stays_near_float32_and_agrees_across_layouts(case: str) -> None:
    exact = [loss for loss, _ in expected("one process", case).steps]
    one = run_ranks(bfloat16_losses, 1, Layout(), case)[0]
    two = run_ranks(bfloat16_losses, 2, Layout(dp_shard=2), case)
    assert two[0] == two[1]
    assert one == pytest.approx(exact, abs=0.03)
    assert two[0] == pytest.approx(exact, abs=0.03)
    assert one != pytest.approx(exact, abs=1e-5), "it is computed in another precision"


def skipped_step(rank: int, layout: Layout) -> tuple[bool, bool, bool]:
    """Rank 1 alone has an infinite gradient: was the step skipped, were the weights kept, is the next one taken."""
    engine = build(make_job(**{"train.optimizer": "sgd"}), layout)
    before = dict(engine.export_weights())
    parameter = next(iter(engine._model.parameters()))
    handle = parameter.register_post_accumulate_grad_hook(
        lambda p: p.grad.to_local().fill_(torch.inf) if rank == 1 else None
    )
    stats = take_step(engine, 0)
    kept = all(torch.equal(before[name], tensor) for name, tensor in engine.export_weights())
    handle.remove()
    return stats.skipped, kept, not take_step(engine, 1).skipped


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all() -> None:
    assert run_ranks(skipped_step, 2, Layout(dp_shard=2)) == [(True, True, True)] * 2


def fail_on_one(rank: int) -> None:
    import torch.distributed as dist

    assert rank == 0, "told by the test"
    dist.barrier()


def test_a_failing_rank_is_reported_while_others_wait_for_it() -> None:
    with pytest.raises(RankFailed, match="told by the test"):
        run_ranks(fail_on_one, 2)
