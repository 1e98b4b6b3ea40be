"""Progress on a pipe and on a terminal."""

from __future__ import annotations

import io

import pytest

from rayswift.progress import Bar, Plain, TimeLeft, describe, open_progress

RECORD = {"step": 3, "loss": 1.23456, "tokens_per_second": 1500.0}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_time_left_follows_the_pace_since_the_first_report() -> None:
    clock = Clock()
    left = TimeLeft(clock)
    assert left.update(0.5) is None  # a resumed run starts in the middle
    clock.now = 10.0
    assert left.update(0.6) == pytest.approx(40.0)
    clock.now = 50.0
    assert left.update(1.0) == 0.0


def test_plain_lines_are_rare_but_keep_first_last_and_evaluations() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Plain(stream, every_s=5, clock=clock)
    progress.phase("training")
    for step in range(1, 11):
        clock.now += 1
        progress.step({"step": step, "loss": 1.0}, step / 10)
    progress.step({"step": 10, "eval_loss": 0.5}, 0.9)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "-- training"
    assert [line.split()[1] for line in lines[1:]] == ["1", "6", "10", "10"]
    assert "left 4.0s" in lines[2]
    assert "held-out 0.500" in lines[-1]


def test_describe_leaves_out_what_is_unknown() -> None:
    assert describe(RECORD) == "step 3  loss 1.235  1.50k tokens/s"
    assert describe({"step": 0, "eval_loss": 2.0, "loss": None}) == "step 0  held-out 2.000"


def test_a_terminal_gets_a_bar_with_the_figures() -> None:
    stream = Terminal()
    progress = open_progress(stream)
    assert isinstance(progress, Bar)
    progress.phase("starting Ray")
    progress.phase("training")
    progress.step(RECORD, 0.5)
    progress.close()
    text = stream.getvalue()
    assert "starting Ray" in text
    assert "loss 1.235" in text
    assert "50%" in text


@pytest.mark.parametrize("kind", [Plain, Bar])
def test_work_goes_on_when_nobody_reads_any_more(kind: type[Plain] | type[Bar]) -> None:
    stream = Terminal()
    progress = kind(stream)
    progress.phase("training")
    stream.close()
    progress.step(RECORD, 0.5)
    progress.phase("writing the report")
    progress.close()


def test_a_pipe_gets_lines() -> None:
    assert isinstance(open_progress(io.StringIO()), Plain)
