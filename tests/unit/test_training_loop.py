"""The one loop: what a step's loss is divided by, when it ends, where the ledger stands, and what repeats."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rayswift.config.job import TrainSpec
from rayswift.data.ledger import END, Ledger
from rayswift.data.types import BadRow, StepInput
from rayswift.errors import WorkerError
from rayswift.methods.sft import Sft
from rayswift.parallel.engine import StepStats
from rayswift.training.evaluate import Evaluator
from rayswift.training.loop import MAX_SKIPPED_STEPS, StepRecord, train
from rayswift.training.state import Horizon, TrainState
from tests.engine_cases import documents
from tests.loop_cases import FakeEngine, step_input, stream

METHOD = Sft(Sft.Config())


class Recorder:
    """Hooks that remember."""

    def __init__(self) -> None:
        self.states: list[TrainState] = []
        self.records: list[StepRecord] = []

    def after_step(self, state: TrainState, record: StepRecord) -> None:
        self.states.append(state)
        self.records.append(record)

    @property
    def losses(self) -> list[float]:
        return [record.stats.loss for record in self.records]


def run(
    engine: FakeEngine, steps: list[StepInput], *, start: TrainState | None = None, rows_total: int = 100, **spec: Any
) -> tuple[TrainState, Recorder]:
    hooks = Recorder()
    horizon = Horizon(TrainSpec(lr=0.5, schedule="constant", **spec), rows_total)
    state = start or TrainState(0, Ledger.start("f"))
    return train(engine, METHOD, stream(steps), state, horizon, hooks), hooks


def three_steps(micro_batches: int = 1) -> list[StepInput]:
    return [step_input(documents(6, seed=n), micro_batches=micro_batches, position=(0, 6 * n + 6)) for n in range(3)]


def test_loss_is_the_mean_over_trained_tokens_whatever_the_micro_batches() -> None:
    engine, split = FakeEngine(), FakeEngine()
    _, one = run(engine, three_steps())
    _, many = run(split, three_steps(micro_batches=3))
    expected = [sum(int(row.mask[1:].sum()) for row in documents(6, seed=n)) for n in range(3)]
    assert engine.counts == split.counts == expected
    assert many.losses == pytest.approx(one.losses, abs=1e-6)
    assert one.losses[0] == pytest.approx(4.9, abs=0.3)  # log of the vocabulary: nothing is learned yet


def test_the_count_is_that_of_all_ranks() -> None:
    engine = FakeEngine(data_size=2)
    share = three_steps()[0]
    engine.others = [[1000.0, 6, 60, 6, 6, 0, 0, 12, 1]]
    _, hooks = run(engine, [share], max_steps=1)
    assert engine.counts == [float(METHOD.count(share.micro_batches[0])) + 1000]
    assert hooks.records[0].tokens == share.num_tokens + 60
    assert (hooks.records[0].sequences, hooks.records[0].rows) == (12, 12)


def test_stops_after_max_steps_without_reading_further() -> None:
    state, hooks = run(FakeEngine(), three_steps(), max_steps=2)
    assert (state.step, len(hooks.records)) == (2, 2)
    assert (state.ledger.chunk, state.ledger.sequence) == (0, 12)


def test_a_run_that_is_done_takes_no_step() -> None:
    done = TrainState(2, Ledger.start("f"))
    state, hooks = run(FakeEngine(), three_steps(), start=done, max_steps=2)
    assert (state, hooks.records) == (done, [])


def test_stops_when_no_rank_has_rows() -> None:
    state, hooks = run(FakeEngine(), three_steps())
    assert (state.step, len(hooks.records)) == (3, 3)


def test_goes_on_while_another_rank_has_rows() -> None:
    engine = FakeEngine(data_size=2)
    engine.others = [[0.0, *[0.0] * 8], [9.0, 4, 40, 4, 4, 0, 0, 0, 0]]
    state, hooks = run(engine, three_steps()[:1])
    assert state.step == 2
    assert engine.counts[1] == 9.0
    assert hooks.records[1].rows == 4


@pytest.mark.parametrize(("data_rank", "expected"), [(0, (3, 5)), (1, (0, 6))])
def test_the_ledger_stands_where_the_last_rank_says(data_rank: int, expected: tuple[int, int]) -> None:
    """Shares are contiguous in rank order: rank 0's own position is not the step's."""
    engine = FakeEngine(data_rank=data_rank, data_size=2)
    others = [3, 5, 1] if data_rank == 0 else [0, 0, 0]
    engine.others = [[7.0, 6, 60, 6, 6, 0, *map(float, others)]]
    state, _ = run(engine, three_steps()[:1], max_steps=1)
    assert (state.ledger.chunk, state.ledger.sequence) == expected


def test_the_ledger_counts_rows_tokens_and_bad_rows() -> None:
    bad = (BadRow("a.jsonl", 3, 4, "not JSON"),)
    share = three_steps()[0]
    steps = [StepInput(share.micro_batches, 6, 60, 6, 7, (1, 2), bad)]
    state, hooks = run(FakeEngine(), steps, max_steps=1)
    assert state.ledger == Ledger("f", 1, 2, rows_visited=7, rows_trained=6, rows_quarantined=1, tokens=60)
    assert hooks.records[0].bad_rows == bad
    assert hooks.records[0].num_bad_rows == 1


def test_a_last_share_that_is_not_full_ends_the_ledger() -> None:
    state, _ = run(FakeEngine(), [step_input(documents(2, seed=0), position=None)])
    assert (state.step, state.ledger.chunk) == (1, END)


def test_the_learning_rate_follows_steps_or_rows() -> None:
    by_steps, by_rows = FakeEngine(), FakeEngine()
    for engine, bound in ((by_steps, {"max_steps": 4}), (by_rows, {})):
        horizon = Horizon(TrainSpec(lr=1.0, schedule="linear", **bound), rows_total=12)
        train(engine, METHOD, stream(three_steps()), TrainState(0, Ledger.start("f")), horizon, Recorder())
    assert by_steps.rates == pytest.approx([1.0, 0.75, 0.5])
    assert by_rows.rates == pytest.approx([1.0, 0.5, 0.0])  # 6 of 12 rows a step


def test_skipped_steps_are_counted_in_a_row() -> None:
    _, hooks = run(FakeEngine(skip=[True, True, False]), three_steps())
    assert [state.skipped_in_a_row for state in hooks.states] == [1, 2, 0]
    assert [record.stats.skipped for record in hooks.records] == [True, True, False]


def test_too_many_skipped_steps_in_a_row_end_the_run() -> None:
    share = step_input(documents(1, seed=0), position=(0, 1))
    nearly = [True] * (MAX_SKIPPED_STEPS - 1) + [False]
    run(FakeEngine(skip=nearly), [share] * len(nearly))
    with pytest.raises(WorkerError, match=r"not finite in 20 steps in a row, up to step 20; lower train\.lr"):
        run(FakeEngine(skip=[True] * MAX_SKIPPED_STEPS), [share] * MAX_SKIPPED_STEPS)


def test_dropout_repeats_with_the_seed_and_differs_without() -> None:
    def losses(seed: int, rank: int = 0) -> list[float]:
        torch.manual_seed(torch.seed() % 1000)  # whatever happened before must not matter
        return run(FakeEngine(dropout=0.3, data_rank=rank, data_size=rank + 1), three_steps(), seed=seed)[1].losses

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)
    assert losses(1, rank=0) != losses(1, rank=1)


def test_any_seed_a_job_may_have_can_be_used() -> None:
    assert run(FakeEngine(dropout=0.3), three_steps(), seed=2**31 - 1)[1].losses


def test_dropout_of_a_step_does_not_depend_on_where_the_run_began() -> None:
    whole = run(FakeEngine(dropout=0.3), three_steps())[1].losses
    engine = FakeEngine(dropout=0.3)
    state, first = run(engine, three_steps()[:1], max_steps=1)
    _, rest = run(engine, three_steps()[1:], start=state)
    assert first.losses + rest.losses == whole


def test_waiting_for_data_is_told_apart_from_the_step() -> None:
    _, hooks = run(FakeEngine(), three_steps())
    assert all(0 <= record.data_wait_s <= record.step_time_s for record in hooks.records)


def test_evaluation_is_a_mean_over_tokens_and_reads_once() -> None:
    engine, reads = FakeEngine(dropout=0.5), []

    def read() -> list[StepInput]:
        reads.append(1)
        return three_steps(micro_batches=2)

    evaluator = Evaluator(engine, METHOD, read)
    one, two = evaluator.loss(), evaluator.loss()
    batches = [batch for step in three_steps() for batch in step.micro_batches]
    total = sum(float(METHOD.loss(engine.forward(batch), batch)) for batch in batches)
    assert one == two == pytest.approx(total / sum(float(METHOD.count(batch)) for batch in batches), abs=1e-5)
    assert reads == [1]


def test_horizon_without_rows_or_with_more_than_planned() -> None:
    ledger = Ledger("f", 0, 0, rows_visited=30, rows_trained=30, rows_quarantined=0, tokens=1)
    horizon = Horizon(TrainSpec(epochs=3), rows_total=20)
    assert horizon.progress(TrainState(1, ledger)) == 1.0
    assert horizon.epoch(TrainState(1, ledger)) == 4.5
    assert Horizon(TrainSpec(), rows_total=0).progress(TrainState(0, Ledger.start("f"))) == 0.0
    assert StepStats(1.0, 2.0).loss == 0.5
