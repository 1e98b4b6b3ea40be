"""Long work made visible: a progress bar on a terminal, plain lines otherwise. All of it goes to stderr.

Knows the records of metrics.jsonl; does not know where they come from.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from rayswift.units import format_count, format_seconds

if TYPE_CHECKING:
    from rich.progress import TaskID

_PLAIN_EVERY_S = 5.0
_NOBODY_READS = suppress(OSError, ValueError)
"""What a closed terminal or pipe raises. The work goes on, and its report is written."""


class Progress(Protocol):
    """What long work tells while it runs. Calls never raise and never block."""

    def phase(self, text: str) -> None:
        """Something that takes a while begins: `starting Ray`, `loading the model`."""
        ...

    def step(self, record: Mapping[str, Any], fraction: float) -> None:
        """A step is done: an object of metrics.jsonl, and how much of the whole work that makes (0 to 1)."""
        ...

    def close(self) -> None:
        """The work has ended; the terminal is given back."""
        ...


class Silent:
    """Tells nothing. The fake beside the real ones, and what `--quiet` uses."""

    def phase(self, text: str) -> None:
        """See Progress."""

    def step(self, record: Mapping[str, Any], fraction: float) -> None:
        """See Progress."""

    def close(self) -> None:
        """See Progress."""


class Plain:
    """Lines for logs and pipes: the first and last step, every evaluation, else one step every few seconds."""

    def __init__(
        self, stream: TextIO, *, every_s: float = _PLAIN_EVERY_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream, self._every_s, self._clock = stream, every_s, clock
        self._eta = TimeLeft(clock)
        self._written: float | None = None

    def phase(self, text: str) -> None:
        """Writes `-- text`, and starts a new estimate of the time left."""
        self._eta = TimeLeft(self._clock)
        self._written = None
        self._write(f"-- {text}")

    def step(self, record: Mapping[str, Any], fraction: float) -> None:
        """Writes `step 12  loss 1.234  ...` when a line is due."""
        left = self._eta.update(fraction)
        now = self._clock()
        due = self._written is None or now - self._written >= self._every_s
        if due or "eval_loss" in record or fraction >= 1:
            self._written = now
            self._write("   " + describe(record) + (f"  left {format_seconds(left)}" if left is not None else ""))

    def close(self) -> None:
        """Nothing to give back."""

    def _write(self, line: str) -> None:
        with _NOBODY_READS:
            print(line, file=self._stream, flush=True)


class Bar:
    """A rich progress bar: what is going on, how far it is, the figures of the newest step, the time left."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description}"), BarColumn(24), TaskProgressColumn(), TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(), console=Console(file=stream), transient=False,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._eta = TimeLeft()
        self._bar.start()

    def phase(self, text: str) -> None:
        """Finishes the row of the phase before and starts one that pulses until the first step."""
        self._finish()
        self._eta = TimeLeft()
        with _NOBODY_READS:
            self._task = self._bar.add_task(text, total=None, figures="")

    def step(self, record: Mapping[str, Any], fraction: float) -> None:
        """Moves the bar."""
        if self._task is None:
            self.phase("training")
        left = self._eta.update(fraction)
        figures = describe(record) + (f"  left {format_seconds(left)}" if left is not None else "")
        with _NOBODY_READS:
            if self._task is not None:
                self._bar.update(self._task, total=1.0, completed=min(fraction, 1.0), figures=figures)

    def close(self) -> None:
        """Leaves the finished rows on the terminal."""
        self._finish()
        with _NOBODY_READS:
            self._bar.stop()

    def _finish(self) -> None:
        if self._task is not None and self._bar.tasks[self._task].total is None:
            with _NOBODY_READS:
                self._bar.update(self._task, total=1.0, completed=1.0)
        self._task = None


class TimeLeft:
    """Seconds left, from how fast the fraction has grown since the first report. None until two reports differ."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start: tuple[float, float] | None = None

    def update(self, fraction: float) -> float | None:
        """The estimate after this much of the work."""
        now = self._clock()
        if self._start is None:
            self._start = now, fraction
        began, first = self._start
        return None if fraction <= first else max(0.0, (1 - fraction) * (now - began) / (fraction - first))


def describe(record: Mapping[str, Any]) -> str:
    """`step 12  loss 1.234  1.20k tokens/s` from an object of metrics.jsonl; what it lacks is left out."""
    parts = [f"step {record['step']}"] if "step" in record else []
    parts += [f"loss {record['loss']:.3f}"] if record.get("loss") is not None else []
    parts += [f"held-out {record['eval_loss']:.3f}"] if record.get("eval_loss") is not None else []
    if record.get("tokens_per_second"):
        parts.append(f"{format_count(record['tokens_per_second'])} tokens/s")
    return "  ".join(parts)


def open_progress(stream: TextIO | None = None) -> Progress:
    """A bar when `stream` (stderr) is a terminal, plain lines otherwise."""
    stream = stream or sys.stderr
    return Bar(stream) if stream.isatty() else Plain(stream)
