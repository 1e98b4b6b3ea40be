"""A tracker can never stop or slow a run: one that raises, hangs or lags is reported once and left behind."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import pytest

from rayswift import plugins
from rayswift.training import trackers
from rayswift.training.trackers import Detached

START: tuple[str, str, dict[str, Any]] = ("project", "name", {})


class Obedient:
    """A tracker that keeps what it gets."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.started: tuple[Any, ...] = ()
        self.closed = False

    def start(self, *args: Any) -> None:
        self.started = args

    def log(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed = True


def wait_until(condition: Any, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.005)


def test_records_arrive_in_order_before_the_end() -> None:
    tracker, warnings = Obedient(), list[str]()
    detached = Detached("x", lambda: tracker, START, warnings.append)
    for step in range(100):
        detached.log({"step": step})
    detached.close()
    assert tracker.started == START
    assert [record["step"] for record in tracker.records] == list(range(100))
    assert tracker.closed
    assert warnings == []


@pytest.mark.parametrize("place", ["make", "start", "log", "close"])
def test_a_tracker_that_raises_is_reported_once(place: str) -> None:
    def fail(*args: Any) -> None:
        raise ConnectionError("no server")

    tracker, warnings = Obedient(), list[str]()
    if place != "make":
        setattr(tracker, place, fail)
    detached = Detached("x", fail if place == "make" else lambda: tracker, START, warnings.append)  # type: ignore[arg-type]
    for step in range(100):
        detached.log({"step": step})
    detached.close()
    assert warnings == ["tracker x stopped: ConnectionError: no server; the run goes on without it"]


@pytest.mark.parametrize("place", ["start", "log", "close"])
def test_a_tracker_that_hangs_is_left_behind(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_CLOSE_TIMEOUT_S", 0.3)
    released, warnings = threading.Event(), list[str]()
    tracker = Obedient()
    setattr(tracker, place, lambda *args: released.wait(30))
    detached = Detached("x", lambda: tracker, START, warnings.append)
    began = time.monotonic()
    for step in range(10):
        detached.log({"step": step})
    logged = time.monotonic()
    detached.close()
    assert logged - began < 1
    assert time.monotonic() - logged < 5
    assert warnings == ["tracker x did not finish within 0.3 s and was left behind"]
    released.set()


def test_a_full_queue_neither_blocks_nor_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_CLOSE_TIMEOUT_S", 0.3)
    released, warnings = threading.Event(), list[str]()
    tracker = Obedient()
    tracker.start = lambda *args: released.wait(30)  # type: ignore[assignment, method-assign]
    detached = Detached("x", lambda: tracker, START, warnings.append)
    began = time.monotonic()
    for step in range(3000):
        detached.log({"step": step})
    detached.close()  # the closing word does not fit into the queue either
    assert time.monotonic() - began < 5
    assert warnings == ["tracker x lags a thousand records behind; later ones are dropped"]
    released.set()


def test_a_lagging_tracker_gets_what_was_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_QUEUE_RECORDS", 3)
    gate, warnings = threading.Event(), list[str]()
    tracker = Obedient()
    tracker.start = lambda *args: gate.wait(30)  # type: ignore[assignment, method-assign]
    detached = Detached("x", lambda: tracker, START, warnings.append)
    for step in range(5):
        detached.log({"step": step})
    gate.set()
    wait_until(lambda: len(tracker.records) == 3)
    detached.close()
    assert [record["step"] for record in tracker.records] == [0, 1, 2]
    assert tracker.closed
    assert len(warnings) == 1


def test_nothing_is_reported_after_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_CLOSE_TIMEOUT_S", 0.1)
    released, warnings = threading.Event(), list[str]()

    def late(*args: Any) -> None:
        released.wait(30)
        raise ConnectionError("too late")

    tracker = Obedient()
    tracker.start = late  # type: ignore[method-assign]
    detached = Detached("x", lambda: tracker, START, warnings.append)
    detached.close()
    released.set()
    detached._thread.join(10)
    assert len(warnings) == 1


@pytest.mark.parametrize("name", plugins.names("training.trackers"))
def test_a_tracker_without_its_package_is_a_warning(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    warnings: list[str] = []
    detached = Detached(name, plugins.load("training.trackers", name), START, warnings.append)
    detached.close()
    assert len(warnings) == 1
    assert warnings[0].startswith(f"tracker {name} stopped: ModuleNotFoundError")
