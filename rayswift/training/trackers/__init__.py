"""Optional experiment trackers, one module each: `start(project, name, job)`, `log(record)`, `close()`.

`Detached` runs any of them in a thread of its own, so that a tracker that raises, hangs or lags never stops or
slows a run: its first failure is reported once, and a full queue drops records.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

_QUEUE_RECORDS = 1000
_CLOSE_TIMEOUT_S = 10.0
_POLL_S = 0.1


class Tracker(Protocol):
    """Sends metrics somewhere else."""

    def start(self, project: str, name: str, job: dict[str, Any]) -> None:
        """Open the run. May raise or hang."""
        ...

    def log(self, record: dict[str, Any]) -> None:
        """Send one metrics.jsonl object."""
        ...

    def close(self) -> None:
        """Finish the run."""
        ...


class Detached:
    """A tracker behind a queue and a daemon thread."""

    def __init__(
        self,
        name: str,
        make: Callable[[], Tracker],
        start: tuple[str, str, dict[str, Any]],
        warn: Callable[[str], None],
    ) -> None:
        self._name, self._make, self._start, self._warn = name, make, start, warn
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(_QUEUE_RECORDS)
        self._reported = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, record: dict[str, Any]) -> None:
        """Hand a record over; dropped when the tracker lags a thousand records behind or has failed."""
        if not self._thread.is_alive():
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._report("lags a thousand records behind; later ones are dropped")

    def close(self) -> None:
        """Give the tracker ten seconds to finish, then leave it."""
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        while self._thread.is_alive() and (left := deadline - time.monotonic()) > 0:
            try:
                self._queue.put(None, timeout=min(left, _POLL_S))
            except queue.Full:  # it lags, and may still catch up
                continue
            self._thread.join(deadline - time.monotonic())
        if self._thread.is_alive():
            self._report(f"did not finish within {_CLOSE_TIMEOUT_S:g} s and was left behind")
        self._reported.set()  # nobody listens any more

    def _run(self) -> None:
        try:
            tracker = self._make()
            tracker.start(*self._start)
            while (record := self._queue.get()) is not None:
                tracker.log(record)
            tracker.close()
        except Exception as error:  # whatever a third party raises, the run goes on
            self._report(f"stopped: {type(error).__name__}: {error}; the run goes on without it")

    def _report(self, what: str) -> None:
        """Warn of the first failure only."""
        if not self._reported.is_set():
            self._reported.set()
            self._warn(f"tracker {self._name} {what}")
