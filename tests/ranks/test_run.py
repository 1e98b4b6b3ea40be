"""Whole runs of `run_rank` on forked gloo ranks: any number of them, stopped, continued by others, and killed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rayswift.cluster.preflight import prepare
from rayswift.errors import CheckpointError
from rayswift.models.folder import rendering_sha256
from rayswift.parallel.engines.deepspeed import Deepspeed
from rayswift.planning.layout import Seat
from rayswift.planning.planner import plan
from rayswift.training import checkpoint
from rayswift.training.order import WorkOrder
from rayswift.training.run import local_open, run_rank
from rayswift.training.run_dir import RunDir
from rayswift.training.state import TrainState
from tests.job_cases import CPU_BOX, ENGINES, make_job
from tests.ranks.forked import RankFailed, run_ranks


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ninety question/answer rows of different lengths, one of them bad."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        json.dumps({"query": f"What is {i}?", "response": "It is " + f"{i * 3} " * (1 + i % 6)}) for i in range(90)
    ]
    lines[40] = json.dumps({"query": "no answer", "response": ""})
    path.write_text("\n".join(lines) + "\n")
    return path


def order_of(name: str, output: Path, model: Path, rows: Path, *, ranks: int, **changes: Any) -> WorkOrder:
    """The work order of a small SGD run over `ranks` workers."""
    settings: dict[str, Any] = {
        "name": name, "output": str(output), "model.path": str(model), "data.train": [{"path": str(rows)}],
        "data.eval": [{"path": str(rows), "limit": 20}], "data.max_length": 64, "data.max_bad_fraction": 0.05,
        "data.chunk_rows": 16, "train.global_batch_size": 4, "train.micro_batch_size": 1, "train.lr": 0.05,
        "train.optimizer": "sgd", "train.epochs": 2, "train.save_every": 2, "train.eval_every": 4,
        "cluster.workers": ranks, "cluster.device": "cpu",
    }  # fmt: skip
    prepared = prepare(make_job(**(settings | changes)))
    engines = ENGINES | {"deepspeed": Deepspeed.capability}
    made = plan(prepared.job, prepared.shape, CPU_BOX, engines=engines)
    return WorkOrder(prepared.job, made, prepared.train_stream, prepared.eval_stream)


def train_rank(rank: int, order: WorkOrder) -> TrainState:
    return run_rank(order, Seat(order.plan.layout, rank), rank, local_open)


def train(order: WorkOrder) -> TrainState:
    """Rank 0's last state, which every rank must share."""
    states: list[TrainState] = run_ranks(train_rank, order.plan.layout.world_size, order)
    assert len(set(states)) == 1
    return states[0]


def figures(order: WorkOrder, key: str) -> list[float]:
    """A figure of metrics.jsonl in step order."""
    return [record[key] for record in RunDir(order.job.run_dir).read_jsonl("metrics.jsonl") if key in record]


@pytest.mark.parametrize("packing", [True, pytest.param(False, marks=pytest.mark.long)], ids=["packed", "unpacked"])
def test_the_number_of_ranks_changes_no_loss_and_no_row(
    tmp_path: Path, tiny_model_dir: Path, rows: Path, packing: bool
) -> None:
    one = order_of("one", tmp_path, tiny_model_dir, rows, ranks=1, **{"data.packing": packing})
    ended = train(one)
    assert (ended.ledger.rows_visited, ended.ledger.rows_trained, ended.ledger.rows_quarantined) == (180, 178, 2)
    for ranks in (2, 4):
        many = order_of(f"many{ranks}", tmp_path, tiny_model_dir, rows, ranks=ranks, **{"data.packing": packing})
        assert train(many) == ended
        assert figures(many, "step") == figures(one, "step") == [0.0, *range(1, ended.step + 1)], "one line per step"
        for key in ("loss", "grad_norm", "eval_loss"):
            assert figures(many, key) == pytest.approx(figures(one, key), abs=1e-5), key
        assert figures(many, "tokens") == figures(one, "tokens")
    assert "eval_loss" in RunDir(one.job.run_dir).read_jsonl("metrics.jsonl")[-1], "the last step is evaluated"
    quarantined = RunDir(one.job.run_dir).read_jsonl("quarantine.jsonl")
    assert {(row["file"], row["line"]) for row in quarantined} == {(str(rows), 41)}


@pytest.mark.parametrize("adapter", [None, {"rank": 4}], ids=["full", "lora"])
def test_a_run_continued_by_other_numbers_of_ranks_is_the_run_of_one(
    tmp_path: Path, tiny_model_dir: Path, rows: Path, adapter: dict[str, Any] | None
) -> None:
    """Stopped after 3, 5 and 9 steps and continued by 2, 4 and 1 ranks, under AdamW, whose state must travel too."""
    common = {"adapter": adapter, "train.optimizer": "adamw", "train.lr": 1e-3, "train.schedule": "constant"}
    whole = order_of("whole", tmp_path, tiny_model_dir, rows, ranks=1, **common, **{"train.max_steps": 12})
    ended = train(whole)
    for ranks, steps in ((1, 3), (2, 5), (4, 9), (1, 12)):
        part = order_of("parts", tmp_path, tiny_model_dir, rows, ranks=ranks, **common, **{"train.max_steps": steps})
        last = train(part)
        assert last.step == steps
    assert last == ended
    assert figures(part, "loss") == pytest.approx(figures(whole, "loss"), abs=2e-5)
    assert figures(part, "step") == sorted(figures(part, "step"))


def test_a_continued_run_is_bit_for_bit_the_run_that_was_not_stopped(
    tmp_path: Path, tiny_model_dir: Path, rows: Path
) -> None:
    settings = {"train.optimizer": "adamw", "train.schedule": "constant", "adapter": {"rank": 4, "dropout": 0.1}}
    whole = order_of("whole", tmp_path, tiny_model_dir, rows, ranks=2, **settings, **{"train.max_steps": 9})
    train(whole)
    for steps in (4, 9):
        part = order_of("parts", tmp_path, tiny_model_dir, rows, ranks=2, **settings, **{"train.max_steps": steps})
        train(part)
    assert figures(part, "loss") == figures(whole, "loss")
    weights = [checkpoint.load_weights(checkpoint.newest(order.job.run_dir)) for order in (whole, part)]
    assert weights[0].keys() == weights[1].keys()
    assert all(np.array_equal(weights[0][name].numpy(), weights[1][name].numpy()) for name in weights[0])


def die_while_saving(rank: int, order: WorkOrder, step: int) -> None:
    """Trains until the files of step `step` are written and no manifest vouches for them; then this rank is gone."""
    from rayswift.training.saver import Saver

    commit = Saver._commit

    def die(self: Saver, writing: Any, url: str, manifest: Any) -> None:
        if not url.endswith(f"{step:08d}"):
            return commit(self, writing, url, manifest)
        writing.result()
        os._exit(9)

    with mock.patch.object(Saver, "_commit", die):
        train_rank(rank, order)


def test_a_checkpoint_that_lost_its_writer_is_never_used(tmp_path: Path, tiny_model_dir: Path, rows: Path) -> None:
    whole = order_of("whole", tmp_path, tiny_model_dir, rows, ranks=2, **{"train.max_steps": 8})
    train(whole)
    order = order_of("killed", tmp_path, tiny_model_dir, rows, ranks=2, **{"train.max_steps": 8})
    with pytest.raises(RankFailed, match="died"):
        run_ranks(die_while_saving, 2, order, 6)
    folders = tmp_path / "killed" / "checkpoints"
    half = folders / "step-00000006"
    assert half.is_dir()
    assert not (half / "manifest.json").exists()
    with pytest.raises(CheckpointError, match="no manifest"):
        checkpoint.check(str(half))
    assert checkpoint.newest(order.job.run_dir).endswith("step-00000004")
    assert train(order).step == 8
    assert figures(order, "loss") == figures(whole, "loss")
    removed = [e for e in RunDir(order.job.run_dir).read_jsonl("events.jsonl") if e["event"] == "removed"]
    assert [event["checkpoints"] for event in removed] == [["step-00000006"]]
    assert sorted(path.name for path in folders.iterdir()) == ["step-00000006", "step-00000008"]
    assert checkpoint.check(checkpoint.newest(order.job.run_dir)).finished


def test_bad_held_out_rows_are_kept_and_have_a_budget(tmp_path: Path, tiny_model_dir: Path, rows: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(line + "\n" for line in rows.read_text().splitlines()[21:51]))
    settings = {"data.eval": [{"path": str(held_out)}], "train.max_steps": 1}
    order = order_of("tolerant", tmp_path, tiny_model_dir, rows, ranks=2, **settings)
    train(order)
    kept = RunDir(order.job.run_dir).read_jsonl("quarantine-eval.jsonl")
    assert [(row["file"], row["line"]) for row in kept] == [(str(held_out), 20)]
    assert RunDir(order.job.run_dir).read_jsonl("quarantine.jsonl") == []
    order = order_of("strict", tmp_path, tiny_model_dir, rows, ranks=2, **settings, **{"data.max_bad_fraction": 0.0})
    with pytest.raises(RankFailed, match=r"DataError: 1 of 30 rows are bad.*held_out\.jsonl:20"):
        run_ranks(train_rank, 2, order)


def test_a_run_that_meets_no_row_it_can_use_is_no_success(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = tmp_path / "disliked.jsonl"
    rows.write_text('{"prompt": "hi", "completion": "yo", "label": false}\n' * 20)
    order = order_of("disliked", tmp_path, tiny_model_dir, rows, ranks=2, **{"data.eval": []})
    with pytest.raises(RankFailed, match="DataError: none of the 40 rows read is trained on"):
        run_ranks(train_rank, 2, order)
    assert checkpoint.find_newest(RunDir(order.job.run_dir)) is None
    assert {row["counts"] for row in RunDir(order.job.run_dir).read_jsonl("quarantine.jsonl")} == {False}


def test_an_adapter_does_not_go_on_beside_another_base(tmp_path: Path, tiny_model_dir: Path, rows: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    settings = {"adapter": {"rank": 4}, "train.max_steps": 2}
    train(order_of("adapted", tmp_path, base, rows, ranks=1, **settings))
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"})
    order = order_of("adapted", tmp_path, base, rows, ranks=1, **(settings | {"train.max_steps": 4}))
    with pytest.raises(RankFailed, match=r"CheckpointError: .*step-00000002.*the base model has changed"):
        run_ranks(train_rank, 1, order)


def test_rows_are_rendered_to_the_end_as_they_were_from_the_start(
    tmp_path: Path, tiny_model_dir: Path, rows: Path
) -> None:
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    template, as_it_was = base / "chat_template.jinja", (base / "chat_template.jinja").read_text()

    def order(max_steps: int) -> WorkOrder:
        return order_of("rendered", tmp_path, base, rows, ranks=1, **{"train.max_steps": max_steps})

    train(order(2))
    manifest = Path(checkpoint.newest(str(tmp_path / "rendered")), checkpoint.MANIFEST)
    record = json.loads(manifest.read_text())
    assert record["rendered_with"] == rendering_sha256(base)
    late = order(4)
    template.write_text(as_it_was.replace("assistant\\n", "helper\\n"))
    rule = r"CheckpointError: .*step-00000002 was made with another chat_template\.jinja in .*base; put it back"
    with pytest.raises(RankFailed, match=rule):
        run_ranks(train_rank, 1, late)
    with pytest.raises(CheckpointError, match=rule.partition(": ")[2]):  # so does the driver say, before it starts Ray
        order(4)
    manifest.write_text(json.dumps(record | {"rendered_with": None}))  # of a version that did not say
    train(order(4))
    assert checkpoint.read_manifest(checkpoint.newest(str(tmp_path / "rendered"))).rendered_with is None


def run_out_of_disk(rank: int, order: WorkOrder) -> str:
    """The disk of rank 1 is full when it writes its shards; what the rank is told."""
    from torch.distributed.checkpoint import FileSystemWriter

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    broken = mock.patch.object(FileSystemWriter, "write_data", full) if rank == 1 else nullcontext()
    try:
        with broken:
            train_rank(rank, order)
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_a_full_disk_on_one_rank_ends_the_run_with_the_reason(tmp_path: Path, tiny_model_dir: Path, rows: Path) -> None:
    order = order_of("full", tmp_path, tiny_model_dir, rows, ranks=2, **{"train.max_steps": 8})
    (told,) = {text for text in run_ranks(run_out_of_disk, 2, order) if "no space left" in text}
    assert "lower train.keep_checkpoints" in told
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        checkpoint.newest(order.job.run_dir)
