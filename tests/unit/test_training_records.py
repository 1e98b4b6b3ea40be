"""What a run leaves behind: metrics.jsonl by its contract, TensorBoard, the report, curves, and who watches them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rayswift.config.job import TrainSpec
from rayswift.data.ledger import Ledger
from rayswift.parallel.engine import StepStats
from rayswift.training import follow
from rayswift.training.follow import Follower
from rayswift.training.loop import StepRecord
from rayswift.training.metrics import RunLog, peak_memory_bytes, step_metrics
from rayswift.training.report import RunReport, draw_curves, losses, steady_tokens_per_second, write_report
from rayswift.training.run_dir import EVENTS, METRICS, JsonlLog, RunDir
from rayswift.training.state import Horizon, TrainState
from tests.job_cases import make_job

CONTRACT = {
    "step", "epoch", "loss", "grad_norm", "lr", "tokens", "rows", "step_time_s", "data_wait_s", "tokens_per_second",
    "peak_memory_bytes",
}  # fmt: skip
CPU = torch.device("cpu")


def record_of(*, skipped: bool = False) -> StepRecord:
    stats = StepStats(loss_sum=30.0, count=20.0, grad_norm=0.5, skipped=skipped, metrics={"accuracy": 0.25})
    return StepRecord(stats, lr=1e-3, tokens=40, rows=4, sequences=2, step_time_s=2.0, data_wait_s=0.5,
                      bad_rows=(), num_bad_rows=0)  # fmt: skip


def test_metrics_are_the_contract() -> None:
    state = TrainState(3, Ledger("f", 0, 0, rows_visited=10, rows_trained=10, rows_quarantined=0, tokens=99))
    found = step_metrics(state, record_of(), Horizon(TrainSpec(epochs=2), rows_total=20), CPU)
    assert set(found) >= CONTRACT
    assert (found["step"], found["epoch"], found["progress"]) == (3, 1.0, 0.5)
    assert (found["loss"], found["grad_norm"], found["lr"]) == (1.5, 0.5, 1e-3)
    assert (found["tokens"], found["rows"], found["tokens_per_second"]) == (40, 4, 20.0)
    assert (found["step_time_s"], found["data_wait_s"], found["accuracy"]) == (2.0, 0.5, 0.25)
    assert "skipped" not in found
    assert json.loads(json.dumps(found)) == found


def test_a_skipped_step_says_so() -> None:
    horizon = Horizon(TrainSpec(), rows_total=20)
    record = record_of(skipped=True)
    record = replace(record, stats=replace(record.stats, loss_sum=math.nan, grad_norm=math.inf))
    found = step_metrics(TrainState(1, Ledger.start("f")), record, horizon, CPU)
    assert found["skipped"] is True
    assert (found["loss"], found["grad_norm"]) == (None, None), "JSON has no number for them"
    json.dumps(found, allow_nan=False)


def test_peak_memory_of_a_process_is_its_own() -> None:
    assert 30 * 2**20 < peak_memory_bytes(CPU) < 200 * 2**30


@pytest.fixture
def folder(tmp_path: Path) -> RunDir:
    return RunDir(str(tmp_path / "demo"))


def test_a_resumed_log_keeps_what_was_committed_and_events_of_all_sessions(folder: RunDir) -> None:
    first = RunLog(folder, make_job(), up_to_step=0)
    first.event("start", 0, world_size=1)
    for step in range(5):
        first.step({"step": step, "loss": 1.0})
    first.close()
    second = RunLog(folder, make_job(), up_to_step=3)
    second.event("start", 3)
    second.step({"step": 4, "loss": 0.5})
    second.close()
    assert [(r["step"], r["loss"]) for r in folder.read_jsonl(METRICS)] == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 0.5)]
    assert [(r["event"], r["step"]) for r in folder.read_jsonl(EVENTS)] == [("start", 0), ("start", 3)]


def test_a_run_that_died_before_its_first_checkpoint_leaves_no_line(folder: RunDir) -> None:
    first = RunLog(folder, make_job(), up_to_step=0)
    first.step({"step": 0, "eval_loss": 2.0})
    first.step({"step": 1, "loss": 1.0})
    first.close()
    second = RunLog(folder, make_job(), up_to_step=0)
    second.step({"step": 0, "eval_loss": 2.0})
    second.close()
    assert folder.read_jsonl(METRICS) == [{"step": 0, "eval_loss": 2.0}]


def test_a_tracker_that_fails_becomes_an_event(folder: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    log = RunLog(folder, make_job(**{"logging.trackers": ["mlflow"]}), up_to_step=0)
    log.step({"step": 1, "loss": 1.0})
    log.close()
    (event,) = folder.read_jsonl(EVENTS)
    assert event["event"] == "warning"
    assert event["message"].startswith("tracker mlflow stopped: ModuleNotFoundError")


def test_a_tensorboard_that_fails_becomes_an_event_and_is_given_up(
    folder: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    log = RunLog(folder, make_job(**{"logging.tensorboard": True}), up_to_step=0)
    log.step({"step": 1, "loss": 1.0})
    log.step({"step": 2, "loss": 1.0})
    log.close()
    assert [record["step"] for record in folder.read_jsonl(METRICS)] == [1, 2]
    (event,) = folder.read_jsonl(EVENTS)
    assert event["message"].startswith("TensorBoard stopped: ModuleNotFoundError")


def test_tensorboard_gets_the_numbers(folder: RunDir) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(folder, make_job(**{"logging.tensorboard": True}), up_to_step=0)
    for step in (1, 2):
        log.step({"step": step, "loss": step / 2, "note": "no number"})
    log.close()
    board = EventAccumulator(folder.path("tensorboard"))
    board.Reload()
    assert board.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(1, 0.5), (2, 1.0)]


def report_of(folder: RunDir, **changes: Any) -> RunReport:
    plain: dict[str, Any] = {
        "name": "demo", "run_dir": folder.url, "steps": 3, "epochs": 1.0, "final_loss": 0.5, "eval_loss_first": 2.0,
        "eval_loss_last": 1.0, "tokens": 1200, "tokens_per_second": 400.0, "rows_read": 12, "rows_trained": 11,
        "rows_quarantined": 1, "restarts_survived": 2, "resumed_from_step": 0, "phases_s": {"train": 3.0},
        "wall_s": 4.0, "planned_memory_bytes": 2**30, "peak_memory_bytes": 2**29, "checkpoint": "x/step-00000003",
    }  # fmt: skip
    return RunReport(**{**plain, **changes})


def write_metrics(folder: RunDir, count: int) -> None:
    lines = [{"step": 0, "eval_loss": 2.0}]
    lines += [{"step": n, "loss": 2.0 / n, "grad_norm": 1.0, "lr": 0.1} for n in range(1, count + 1)]
    folder.write_jsonl(METRICS, lines)


def test_the_report_is_json_a_page_and_a_picture(folder: RunDir) -> None:
    from matplotlib.image import imread

    write_metrics(folder, 3)
    write_report(report_of(folder))
    assert json.loads(folder.read_text("report.json")) == report_of(folder).model_dump()
    page = folder.read_text("report.md")
    for text in ("# Run demo", "| held-out loss | 2.0000 before, 1.0000 after |", "![loss](curves.png)",
                 "| rows | 12 read, 11 trained on, 1 quarantined |", "| restarts survived | 2 |",
                 "| memory per worker | 512.0 MiB at peak, 1.0 GiB planned |"):  # fmt: skip
        assert text in page
    assert "| steps | 3 (1.00 epochs) |" in page
    assert "3 (1.00 epochs), 2 skipped |" in report_of(folder, steps_skipped=2).summary()
    picture = imread(folder.path("curves.png"))
    assert picture.shape[:2] == (720, 1080)
    assert picture.std() > 0.01, "something was drawn"


@pytest.mark.parametrize("count", [0, 1, 40])
def test_curves_are_drawn_for_any_number_of_steps(folder: RunDir, count: int) -> None:
    write_metrics(folder, count)
    draw_curves(folder)
    assert Path(folder.path("curves.png")).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_curves_without_metrics(folder: RunDir) -> None:
    folder.write_text("job.yaml", "")
    draw_curves(folder)
    assert folder.exists("curves.png")


def test_what_was_not_measured_is_said(folder: RunDir) -> None:
    summary = report_of(folder, final_loss=None, eval_loss_first=None, eval_loss_last=None).summary()
    assert "| held-out loss | not measured before, not measured after |" in summary


def test_steady_speed_leaves_the_first_steps_out() -> None:
    rates = [1, 1, 1, 100, 300, 200]
    records = [{"step": n, "tokens_per_second": rate} for n, rate in enumerate(rates)]
    assert steady_tokens_per_second(records) == 200
    assert steady_tokens_per_second(records[:3]) == 1
    assert steady_tokens_per_second([{"step": 0, "eval_loss": 1.0}]) is None
    assert losses([{"step": 0, "eval_loss": 1.0}, {"step": 1, "loss": 0.0}], "loss") == [(1, 0.0)]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.005)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_LOCAL_POLL_S", 0.01)


@pytest.mark.usefixtures("quick")
def test_a_follower_reports_each_new_line_once(folder: RunDir) -> None:
    old = JsonlLog(folder, METRICS, up_to_step=9)
    old.append({"step": 1})
    old.close()
    steps: list[int] = []
    events: list[str] = []
    with Follower(folder, on_step=lambda r: steps.append(r["step"]), on_event=lambda r: events.append(r["event"])) as f:
        log = JsonlLog(folder, METRICS, up_to_step=9)
        log.append({"step": 2})
        wait_until(lambda: steps == [2])
        assert f.first_step_at is not None
        log.append({"step": 3})
        log.close()
        folder.write_jsonl(EVENTS, [{"event": "start"}])
    assert steps == [2, 3], "what was written before the end is reported at the end"
    assert events == ["start"]


@pytest.mark.usefixtures("quick")
def test_a_follower_waits_for_the_end_of_a_line(folder: RunDir) -> None:
    steps: list[int] = []
    folder.write_text("x", "")
    with (
        open(folder.path(METRICS), "w") as file,
        Follower(folder, on_step=lambda r: steps.append(r["step"]), on_event=lambda r: None),
    ):
        file.write('{"step": 1}\n{"st')
        file.flush()
        wait_until(lambda: steps == [1])
        file.write('ep": 2}\n')
        file.flush()
        wait_until(lambda: steps == [1, 2])


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("last", [2, 3, 4, 9], ids=["shorter", "as long", "longer", "much longer"])
def test_a_follower_goes_on_after_a_restart_cut_the_file_back(folder: RunDir, last: int) -> None:
    """The file may have grown past the known position again before anyone looked."""
    steps: list[int] = []
    with Follower(folder, on_step=lambda record: steps.append(record["step"]), on_event=lambda r: None):
        folder.write_jsonl(METRICS, [{"step": n, "time": 0.25} for n in (1, 2, 3)])
        wait_until(lambda: steps == [1, 2, 3])
        again = [{"step": 1, "time": 0.25}, *({"step": n, "time": 0.125} for n in range(2, last + 1))]
        folder.write_jsonl(METRICS, again)
        wait_until(lambda: max(steps) == max(3, last))
        log = JsonlLog(folder, METRICS, up_to_step=last)
        log.append({"step": 10, "time": 0.5})
        wait_until(lambda: steps[-1] == 10)
        log.close()
    assert steps == [1, 2, 3, *range(4, last + 1), 10], "each step once"


def test_a_follower_of_nothing_ends(folder: RunDir) -> None:
    with Follower(folder, on_step=lambda r: None, on_event=lambda r: None) as follower:
        pass
    assert follower.first_step_at is None
