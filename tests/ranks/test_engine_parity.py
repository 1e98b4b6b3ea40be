"""The same training run under every layout, compared with one bare torch loop over unpacked documents.

SGD, because AdamW turns the rounding of a gradient near zero into a step of full size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch

from rayswift.planning.layout import Layout
from tests.engine_cases import DOCS_PER_STEP, Reference, build, documents, take_step, tiny_model
from tests.job_cases import make_job
from tests.ranks.forked import RankFailed, run_ranks

STEPS, LR = 4, 0.1
LAYOUTS = {
    "one process": Layout(),
    "ddp 2": Layout(dp_replicate=2),
    "fsdp2 2": Layout(dp_shard=2),
    "fsdp2 4": Layout(dp_shard=4),
    "hsdp 2x2": Layout(dp_replicate=2, dp_shard=2),
    "tp 2": Layout(tp=2),
    "tp 2 x fsdp2 2": Layout(dp_shard=2, tp=2),
    "cp 2": Layout(cp=2),
    "cp 2 x fsdp2 2": Layout(dp_shard=2, cp=2),
    "cp 2 x tp 2": Layout(cp=2, tp=2),
    "pp 2": Layout(pp=2),
    "pp 2 x fsdp2 2": Layout(pp=2, dp_shard=2),
}


@dataclass(frozen=True)
class Case:
    """What is trained, and in how many pieces a step is computed."""

    packing: bool = True
    micro_batches: int = 1
    lora: bool = False
    tied: bool = False
    changes: dict[str, Any] = field(default_factory=dict)

    def job(self) -> Any:
        settings: dict[str, Any] = {"train.optimizer": "sgd", "train.lr": LR, "train.max_grad_norm": 0.5}
        adapter = {"adapter": {"rank": 4}} if self.lora else {}
        return make_job(**(settings | adapter | self.changes))


CASES = {
    "packed": Case(),
    "unpacked, accumulated": Case(packing=False, micro_batches=3),
    "packed, accumulated": Case(micro_batches=2),
    "no clipping": Case(changes={"train.max_grad_norm": None}),
    "recomputed": Case(micro_batches=2, changes={"model.activation_checkpointing": True}),
    "tied embeddings": Case(tied=True),
    "lora": Case(lora=True, micro_batches=2),
    "lora, recomputed": Case(lora=True, changes={"model.activation_checkpointing": True}),
}


@dataclass(frozen=True)
class Outcome:
    """What a rank saw: (loss, gradient norm) of each step, and the trained weights after the last."""

    steps: list[tuple[float, float]]
    weights: dict[str, Any]


def train_cases(rank: int, layout: Layout, cases: dict[str, Case]) -> dict[str, Outcome]:
    """Every case on this rank, one after the other."""
    return {name: _train(layout, case) for name, case in cases.items()}


def _train(layout: Layout, case: Case) -> Outcome:
    engine = build(case.job(), layout, tied=case.tied, engine="pipeline" if layout.pp > 1 else "fsdp2")
    found = []
    for number in range(STEPS):
        stats = take_step(engine, number, packing=case.packing, micro_batches=case.micro_batches, lr=LR)
        assert stats.grad_norm is not None
        found.append((stats.loss, stats.grad_norm))
    return Outcome(found, {name: tensor.numpy() for name, tensor in engine.export_weights()})


@cache
def outcomes(layout: str) -> list[dict[str, Outcome]]:
    """Each rank's outcomes; a layout's ranks are forked once for all its cases."""
    chosen = LAYOUTS[layout]
    return run_ranks(train_cases, chosen.world_size, chosen, CASES)


@cache
def expected(case: str) -> Outcome:
    chosen = CASES[case]
    reference = Reference(tiny_model(lora=chosen.lora, tied=chosen.tied), chosen.job())
    steps = [reference.step(documents(DOCS_PER_STEP, seed=number)) for number in range(STEPS)]
    return Outcome(steps, {name: tensor.numpy() for name, tensor in reference.weights().items()})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_computes_the_run_of_a_bare_loop(layout: str, case: str) -> None:
    reference = expected(case)
    ranks = [rank[case] for rank in outcomes(layout)]
    assert reference.weights.keys() <= {name for outcome in ranks for name in outcome.weights}
    for outcome in ranks:
        for (loss, norm), (wanted_loss, wanted_norm) in zip(outcome.steps, reference.steps, strict=True):
            assert loss == pytest.approx(wanted_loss, abs=1e-5)
            assert norm == pytest.approx(wanted_norm, abs=1e-5, rel=1e-5)
        for name in reference.weights.keys() & outcome.weights.keys():  # of a pipeline a rank has its stages'
            assert outcome.weights[name] == pytest.approx(reference.weights[name], abs=1e-5), name


def test_the_reference_learns_and_its_steps_differ() -> None:
    """What the layouts are compared with is a run in which something happens."""
    losses = [loss for loss, _ in expected("packed").steps]
    assert len({round(loss, 3) for loss in losses}) == STEPS
    assert max(norm for _, norm in expected("packed").steps) > 0.5, "the gradient is clipped"


def bfloat16_losses(rank: int, layout: Layout, lora: bool) -> list[float]:
    engine = build(Case(lora=lora, changes={"model.dtype": "bfloat16"}).job(), layout)
    return [take_step(engine, number, micro_batches=2, lr=LR).loss for number in range(STEPS)]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_bfloat16_stays_near_float32_and_agrees_across_layouts(lora: bool) -> None:
    exact = [loss for loss, _ in expected("lora" if lora else "packed").steps]
    one = run_ranks(bfloat16_losses, 1, Layout(), lora)[0]
    two = run_ranks(bfloat16_losses, 2, Layout(dp_shard=2), lora)
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
