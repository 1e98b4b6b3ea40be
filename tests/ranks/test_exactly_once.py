"""Each row of each epoch is trained on exactly once: after a kill, a resume, another number of ranks, or all three.

Proved by the audit, from what the killed processes left on the disk.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from rayswift import api
from rayswift.planning.layout import Seat
from rayswift.training import checkpoint
from rayswift.training.hooks import RunHooks
from rayswift.training.loop import StepRecord
from rayswift.training.order import WorkOrder
from rayswift.training.run import local_open, run_rank
from rayswift.training.state import TrainState
from tests.ranks.forked import RankFailed, run_ranks
from tests.ranks.test_run import figures, order_of, train


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files: rows of different lengths, some of them bad, one too long."""
    folder = tmp_path_factory.mktemp("rows")
    paths = [folder / "first.jsonl", folder / "second.jsonl"]
    for path, count in zip(paths, (70, 30), strict=True):
        lines = [
            json.dumps({"query": f"What is {i}?", "response": "It is " + f"{i * 3} " * (1 + i % 6)})
            for i in range(count)
        ]
        lines[count // 2] = json.dumps({"query": "no answer", "response": ""})
        lines[count // 3] = json.dumps({"query": "long", "response": "word " * 100})
        path.write_text("\n".join(lines) + "\n")
    return paths


def killed_rank(rank: int, order: WorkOrder, step: int, victim: int) -> TrainState:
    """Trains until step `step` is done and maybe saved; then the process of one rank is gone, as by kill -9."""
    after_step = RunHooks.after_step

    def die(self: RunHooks, state: TrainState, record: StepRecord) -> None:
        after_step(self, state, record)
        if state.step == step and rank == victim:
            os.kill(os.getpid(), 9)

    with mock.patch.object(RunHooks, "after_step", die):
        return run_rank(order, Seat(order.plan.layout, rank), rank, local_open)


CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "packed, 1 to 2": ((1, 2), {}),
    "packed, 2 to 1, weights": ((2, 1), {"weight": 1.5}),
    "unpacked, 2 to 3, not shuffled": ((2, 3), {"data.packing": False, "data.shuffle": False}),
    "split rows, 3 to 1 to 2": ((3, 1, 2), {"data.truncation": "split", "weight": 0.4}),
}


@pytest.mark.parametrize("case", CASES)
def test_each_row_is_trained_on_once_whoever_dies(
    tmp_path: Path, tiny_model_dir: Path, sources: list[Path], case: str
) -> None:
    ranks, changes = CASES[case]
    changes = dict(changes)
    given = [{"path": str(sources[0])}, {"path": str(sources[1]), "weight": changes.pop("weight", 1.0)}]
    settings = {
        "data.train": given, "data.eval": [], "train.global_batch_size": 12, "train.save_every": 3,
        "train.eval_every": None, "data.max_bad_fraction": 0.2, **changes,
    }  # fmt: skip
    chance = random.Random(case)
    step = 3  # there is a checkpoint by then: without one, a run of another layout starts as another run does
    for number in ranks[:-1]:
        order = order_of("killed", tmp_path, tiny_model_dir, sources[0], ranks=number, **settings)
        step += chance.randint(1, 4)
        with pytest.raises(RankFailed, match="died"):
            run_ranks(killed_rank, number, order, step, chance.randrange(number))
        api.audit(order.job.run_dir).check()
    order = order_of("killed", tmp_path, tiny_model_dir, sources[0], ranks=ranks[-1], **settings)
    ended = train(order)
    report = api.audit(order.job.run_dir)
    report.check()
    assert report.total.remaining == 0
    assert report.total.trained == ended.ledger.rows_trained
    assert report.total.quarantined == ended.ledger.rows_quarantined > 0
    assert report.total.read == order.train_stream.num_rows_total
    assert (report.total.split > 0) == ("split" in case)
    assert (report.total.truncated > 0) == ("split" not in case)


def test_with_an_unchanged_layout_the_losses_are_bit_for_bit_those_of_a_run_that_nobody_killed(
    tmp_path: Path, tiny_model_dir: Path, sources: list[Path]
) -> None:
    settings = {"data.train": [{"path": str(path)} for path in sources], "data.eval": [], "train.eval_every": None}
    settings |= {"train.save_every": 3, "data.max_bad_fraction": 0.2, "train.optimizer": "adamw", "train.lr": 1e-3}
    whole = order_of("whole", tmp_path, tiny_model_dir, sources[0], ranks=2, **settings)
    train(whole)
    order = order_of("killed", tmp_path, tiny_model_dir, sources[0], ranks=2, **settings)
    for step, victim in ((5, 1), (10, 0)):
        with pytest.raises(RankFailed, match="died"):
            run_ranks(killed_rank, 2, order, step, victim)
    manifest = checkpoint.read_manifest(checkpoint.newest(order.job.run_dir))
    assert manifest.ledger["sequence"], "it stands inside a chunk"
    assert checkpoint.CHUNK in manifest.files, "whose layout it keeps"
    train(order)
    assert figures(order, "loss") == figures(whole, "loss")
    reports = [api.audit(run.job.run_dir) for run in (order, whole)]
    for report in reports:
        report.check()
    assert reports[0].total == reports[1].total
