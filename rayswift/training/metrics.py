"""metrics.jsonl, TensorBoard and trackers: where the figures of a step go. Written by rank 0 alone."""

from __future__ import annotations

import math
import resource
import sys
import time
from functools import partial
from typing import Any

import torch

from rayswift import plugins
from rayswift.config.job import Job
from rayswift.training.loop import StepRecord
from rayswift.training.run_dir import EVENTS, METRICS, JsonlLog, RunDir
from rayswift.training.state import Horizon, TrainState
from rayswift.training.trackers import Detached, Tracker

_FLUSH_EVERY_S = 10.0


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this rank has held: of its accelerator, or of its process on a CPU."""
    if device.type in ("cpu", "mps"):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return int(torch.accelerator.max_memory_allocated(device))


def step_metrics(state: TrainState, record: StepRecord, horizon: Horizon, device: torch.device) -> dict[str, Any]:
    """One object of metrics.jsonl; its keys are a contract (see the README)."""
    return {
        "step": state.step,
        "epoch": round(horizon.epoch(state), 6),
        "loss": _number(record.stats.loss),
        "grad_norm": _number(record.stats.grad_norm),
        "lr": record.lr,
        "tokens": record.tokens,
        "rows": record.rows,
        "step_time_s": round(record.step_time_s, 6),
        "data_wait_s": round(record.data_wait_s, 6),
        "tokens_per_second": round(record.tokens / max(record.step_time_s, 1e-9), 2),
        "peak_memory_bytes": peak_memory_bytes(device),
        "progress": round(horizon.progress(state), 6),
        **({"skipped": True} if record.stats.skipped else {}),
        **record.stats.metrics,
    }


def _number(value: float | None) -> float | None:
    """None for what JSON has no number for: the loss or the norm of a step that was skipped."""
    return value if value is not None and math.isfinite(value) else None


class RunLog:
    """The metrics and events of a run, continued after the step a resumed run starts from."""

    def __init__(self, run_dir: RunDir, job: Job, *, up_to_step: int) -> None:
        # A run that starts from nothing evaluates step 0 again, so even that line goes.
        self._metrics = JsonlLog(run_dir, METRICS, up_to_step=up_to_step or -1)
        self._events = JsonlLog(run_dir, EVENTS, up_to_step=sys.maxsize)
        self._flushed = time.monotonic()
        self._trackers = [
            Detached(name, partial(_tracker, name), _start(job), self._warn) for name in job.logging.trackers
        ]
        self._board = _Board(run_dir, up_to_step) if job.logging.tensorboard and run_dir.is_local else None

    def step(self, record: dict[str, Any]) -> None:
        """Record one step everywhere."""
        self._metrics.append(record)
        for tracker in self._trackers:
            tracker.log(record)
        if self._board is not None:
            self._show(self._board, record)
        if time.monotonic() - self._flushed > _FLUSH_EVERY_S:
            self.flush()

    def event(self, kind: str, step: int, **details: Any) -> None:
        """Record something that is not a step: a start, a resume, a warning."""
        self._events.append({"event": kind, "step": step, "time": time.time(), **details})

    def flush(self) -> None:
        """Make what was recorded durable."""
        self._metrics.flush()
        self._events.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush and close everything; a tracker that hangs is left behind."""
        for tracker in self._trackers:
            tracker.close()
        if self._board is not None:
            self._board.close()
        self._metrics.close()
        self._events.close()

    def _show(self, board: _Board, record: dict[str, Any]) -> None:
        """Hand a record to TensorBoard, which is given up at its first failure: it may not stop a run."""
        try:
            board.add(record)
        except Exception as error:
            self._warn(f"TensorBoard stopped: {type(error).__name__}: {error}; the run goes on without it")
            self._board = None

    def _warn(self, message: str) -> None:
        self.event("warning", 0, message=message)


class _Board:
    """TensorBoard event files below `tensorboard/`; tensorboardX is loaded after the first step, not before."""

    def __init__(self, run_dir: RunDir, purge_after: int) -> None:
        self._folder, self._purge_after = run_dir.path("tensorboard"), purge_after
        self._writer: Any = None

    def add(self, record: dict[str, Any]) -> None:
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(self._folder, purge_step=self._purge_after + 1)
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(f"train/{key}", value, record["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _tracker(name: str) -> Tracker:
    """Made in the tracker's own thread, because a third party may raise on import."""
    made: Tracker = plugins.load("training.trackers", name, path="logging.trackers")()
    return made


def _start(job: Job) -> tuple[str, str, dict[str, Any]]:
    return job.logging.project, job.name, job.model_dump(mode="json")
