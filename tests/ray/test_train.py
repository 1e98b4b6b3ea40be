"""Whole runs on a real Ray cluster: the same losses for any number of workers, and after any death."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from rayswift import api
from rayswift.config.job import Job
from rayswift.errors import DataError, PlanError
from tests.run_cases import committed_step, losses, wait_for

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster(ray_temp_dir: str) -> Iterator[None]:
    """One two-CPU cluster for all runs of this file; `api.run` joins a session that is up."""
    from rayswift.cluster.session import configure, worker_python

    configure()
    ray.init(
        address="local", num_cpus=2, _temp_dir=ray_temp_dir, include_dashboard=False, log_to_driver=False,
        configure_logging=False, runtime_env=worker_python(),
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hundred question/answer rows of different lengths."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        json.dumps({"query": f"What is {i} and {i % 7}?", "response": "The answer is " + f"{i * 3} " * (1 + i % 5)})
        for i in range(200)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def make_job(name: str, output: Path, model: Path, rows: Path, **changes: Any) -> Job:
    """A small job; `changes` are dotted keys with `__` for the dot."""
    plain: dict[str, Any] = {
        "name": name,
        "output": str(output),
        "model": {"path": str(model)},
        "data": {"train": [{"path": str(rows)}], "max_length": 64},
        "train": {"max_steps": 8, "epochs": 9, "global_batch_size": 4, "micro_batch_size": 2, "lr": 0.05,
                  "optimizer": "sgd", "schedule": "constant", "save_every": 2},
        "cluster": {"workers": 1},
    }  # fmt: skip
    for key, value in changes.items():
        section, field = key.split("__")
        plain.setdefault(section, {})[field] = value
    return Job.model_validate(plain)


@pytest.mark.parametrize("packing", [True, pytest.param(False, marks=pytest.mark.long)], ids=["packed", "unpacked"])
def test_two_workers_compute_the_losses_of_one(tmp_path: Path, tiny_model_dir: Path, rows: Path, packing: bool) -> None:
    one = make_job("one", tmp_path, tiny_model_dir, rows, data__packing=packing, train__micro_batch_size=4)
    two = make_job("two", tmp_path, tiny_model_dir, rows, data__packing=packing, cluster__workers=2,
                   train__micro_batch_size=1)  # fmt: skip
    first, second = api.run(one), api.run(two)
    assert first.steps == second.steps == 8
    assert first.rows_trained == second.rows_trained
    assert losses(first.run_dir) == pytest.approx(losses(second.run_dir), abs=1e-5)
    assert json.loads((tmp_path / "two" / "plan.json").read_text())["layout"]["dp_shard"] == 2


@pytest.mark.long
def test_a_run_changes_its_layout_and_not_its_losses(tmp_path: Path, tiny_model_dir: Path, rows: Path) -> None:
    """Started tensor parallel, continued as a pipeline, exported from there: the run of one worker.

    Chunks are small, so that most rows come through Ray, which hands a block out once, and not from the head start.
    """
    small = {"data__chunk_rows": 16, "cluster__workers": 2}
    whole = api.run(make_job("whole", tmp_path, tiny_model_dir, rows, train__max_steps=16, data__chunk_rows=16))
    api.run(make_job("moved", tmp_path, tiny_model_dir, rows, train__max_steps=9, parallel__tp=2, **small))
    moved = api.run(make_job("moved", tmp_path, tiny_model_dir, rows, train__max_steps=16, parallel__pp=2, **small))
    assert moved.resumed_from_step == 9
    assert moved.rows_trained == whole.rows_trained
    assert losses(moved.run_dir) == pytest.approx(losses(whole.run_dir), abs=1e-5)
    api.audit(moved.run_dir).check()
    assert json.loads((tmp_path / "moved" / "plan.json").read_text())["engine"] == "pipeline"
    exports = [api.export(run.run_dir, str(tmp_path / "exports" / run.name), engine="none") for run in (whole, moved)]
    assert all(export.verify is not None and export.verify.logprobs.within for export in exports)


def test_a_killed_worker_costs_no_row_and_changes_no_loss(tmp_path: Path, tiny_model_dir: Path, rows: Path) -> None:
    whole = api.run(make_job("whole", tmp_path, tiny_model_dir, rows, train__max_steps=80))
    job = make_job("killed", tmp_path, tiny_model_dir, rows, train__max_steps=80)
    killer = threading.Thread(target=_kill_worker_after, args=(tmp_path / "killed", 6))
    killer.start()
    survived = api.run(job)
    killer.join()
    assert survived.restarts_survived == 1
    assert survived.rows_trained == whole.rows_trained
    assert losses(survived.run_dir) == losses(whole.run_dir), "bit for bit on a CPU"


def _kill_worker_after(run_dir: Path, step: int) -> None:
    wait_for(lambda: committed_step(run_dir) >= step, "checkpoint")
    start = json.loads((run_dir / "events.jsonl").read_text().splitlines()[0])
    os.kill(start["pid"], signal.SIGKILL)


@pytest.mark.long
def test_a_run_is_extended_and_finished_once(tmp_path: Path, tiny_model_dir: Path, rows: Path) -> None:
    whole = api.run(make_job("long", tmp_path, tiny_model_dir, rows, train__max_steps=6))
    api.run(make_job("short", tmp_path, tiny_model_dir, rows, train__max_steps=3))
    extended = api.run(make_job("short", tmp_path, tiny_model_dir, rows, train__max_steps=6))
    assert extended.resumed_from_step == 3
    assert losses(extended.run_dir) == losses(whole.run_dir)
    before = (tmp_path / "short" / "metrics.jsonl").stat().st_mtime_ns
    again = api.run(make_job("short", tmp_path, tiny_model_dir, rows, train__max_steps=6))
    assert again == extended, "a finished run reports and does not run"
    assert (tmp_path / "short" / "metrics.jsonl").stat().st_mtime_ns == before


def test_bad_rows_are_quarantined_until_there_are_too_many(tmp_path: Path, tiny_model_dir: Path, rows: Path) -> None:
    lines = rows.read_text().splitlines()
    lines[150] = "{not json"
    lines[160] = json.dumps({"query": "no answer", "response": ""})
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(lines) + "\n")
    report = api.run(make_job("tolerant", tmp_path, tiny_model_dir, bad, train__max_steps=None, train__epochs=1))
    assert (report.rows_read, report.rows_trained, report.rows_quarantined) == (200, 198, 2)
    kept = [json.loads(line) for line in (tmp_path / "tolerant" / "quarantine.jsonl").read_text().splitlines()]
    assert sorted((row["line"], row["file"]) for row in kept) == [(151, str(bad)), (161, str(bad))]
    strict = make_job("strict", tmp_path, tiny_model_dir, bad, data__max_bad_fraction=0.005)
    strict = strict.model_copy(update={"train": strict.train.model_copy(update={"max_steps": None, "epochs": 1})})
    with pytest.raises(DataError, match=r"2 of 200 rows.*max_bad_fraction=0\.005.*bad\.jsonl:1[56]1: "):
        api.run(strict)


@pytest.mark.parametrize("name", ["llamafactory_demo/alpaca_en_demo.json", "gsm8k/train.jsonl"])
def test_real_data_trains_as_it_lies_there(tmp_path: Path, tiny_model_dir: Path, shared_data: Path, name: str) -> None:
    job = make_job("real", tmp_path, tiny_model_dir, shared_data / name, data__max_length=512, train__max_steps=3)
    report = api.run(job)
    assert report.steps == 3
    assert report.rows_trained >= 12
    assert report.rows_quarantined <= 0.01 * report.rows_read


def test_workers_that_cannot_be_placed_end_the_run_in_time(tmp_path: Path, tiny_model_dir: Path, rows: Path) -> None:
    hog = ray.remote(num_cpus=2)(_Hog).remote()
    assert ray.get(hog.ready.remote())
    began = time.monotonic()
    with pytest.raises(PlanError, match=r"cluster\.scheduling_timeout_s=5"):
        api.run(make_job("starved", tmp_path, tiny_model_dir, rows, cluster__scheduling_timeout_s=5))
    assert time.monotonic() - began < 60
    ray.kill(hog)


class _Hog:
    """Holds every CPU."""

    def ready(self) -> bool:
        return True


def test_a_job_that_does_not_fit_leaves_nothing_and_may_be_corrected(
    tmp_path: Path, tiny_model_dir: Path, rows: Path
) -> None:
    refused = make_job("fitted", tmp_path, tiny_model_dir, rows, cluster__workers=3)
    with pytest.raises(PlanError, match=r"train\.global_batch_size=4 does not split over 3 data ranks"):
        api.run(refused)
    assert not (tmp_path / "fitted").exists()
    changes = {"train__global_batch_size": 2, "train__max_steps": 2, "data__max_length": 32}
    assert api.run(make_job("fitted", tmp_path, tiny_model_dir, rows, **changes)).steps == 2
