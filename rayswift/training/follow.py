"""Watches a run from outside: reads new lines of metrics.jsonl and events.jsonl and hands them on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

from rayswift.training.run_dir import EVENTS, METRICS, RunDir

_LOCAL_POLL_S = 0.3
_REMOTE_POLL_S = 5.0
_MARK_BYTES = 200  # a line of metrics holds times that no repetition has twice


class Follower:
    """A thread that reports each new record of a run once. A resumed run's old lines are not reported."""

    def __init__(
        self,
        run_dir: RunDir,
        *,
        on_step: Callable[[dict[str, Any]], None],
        on_event: Callable[[dict[str, Any]], None],
    ) -> None:
        self._run_dir = run_dir
        self._steps, self._events = _Tail(run_dir, METRICS, on_step), _Tail(run_dir, EVENTS, on_event)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="follow-run", daemon=True)
        self.first_step_at: float | None = None

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        pause = _LOCAL_POLL_S if self._run_dir.is_local else _REMOTE_POLL_S
        while not self._stop.wait(pause):
            self._poll()
        self._poll()

    def _poll(self) -> None:
        self._events.poll()  # first, because a start is announced before its steps
        if self._steps.poll() and self.first_step_at is None:
            self.first_step_at = time.perf_counter()


class _Tail:
    """New whole lines of one file. A restarted worker cuts it back to its checkpoint and writes on from there.

    That shows in the bytes before the position, even when the file has already grown past it again; what follows
    is then found by its step.
    """

    def __init__(self, run_dir: RunDir, name: str, report: Callable[[dict[str, Any]], None]) -> None:
        self._run_dir, self._name, self._report = run_dir, name, report
        self._position, self._mark, self._last_step = 0, b"", -1
        self._advance(self._read(0))

    def poll(self) -> int:
        """The number of new lines reported."""
        data = self._read(self._position - len(self._mark))
        if data.startswith(self._mark):
            records = self._advance(data[len(self._mark) :])
        else:
            before, self._position = self._last_step, 0
            records = [record for record in self._advance(self._read(0)) if record.get("step", 0) > before]
        for record in records:
            self._report(record)
        return len(records)

    def _advance(self, data: bytes) -> list[dict[str, Any]]:
        """The records in the whole lines of `data`, which begins at the position; the position goes behind them."""
        whole = data[: data.rfind(b"\n") + 1]
        records = [json.loads(line) for line in whole.split(b"\n") if line]
        self._position += len(whole)
        self._mark = (self._mark + whole)[-_MARK_BYTES:] if self._position > len(whole) else whole[-_MARK_BYTES:]
        if records:
            self._last_step = max(self._last_step, *(record.get("step", 0) for record in records))
        return records

    def _read(self, start: int) -> bytes:
        path = self._run_dir.path(self._name)
        try:
            self._run_dir.fs.invalidate_cache()
            with self._run_dir.fs.open(path, "rb") as stream:
                stream.seek(start)
                return bytes(stream.read())
        except FileNotFoundError:
            return b""
