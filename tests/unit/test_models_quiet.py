"""Other people's bars are silent where they are unasked, and only there; what is warned of is seen."""

from __future__ import annotations

import sys
import threading
import warnings
from contextlib import suppress

import pytest
from tqdm import tqdm

from rayswift.models.quiet import quiet_progress


def bar(**given: object) -> list[int]:
    return list(tqdm(range(3), desc="somebody's bar", **given))


def test_bars_are_silent_meanwhile_and_back_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet_progress():
        assert bar() == bar(disable=False) == [0, 1, 2]
        with tqdm(total=2, desc="by hand") as shown:
            shown.update(2)
        print("a warning", file=sys.stderr)
        with pytest.warns(UserWarning, match="of theirs"):
            warnings.warn("of theirs", stacklevel=1)
    assert capsys.readouterr().err == "a warning\n"
    assert bar() == [0, 1, 2]
    assert "somebody's bar: 100%" in capsys.readouterr().err


def test_bars_come_back_after_errors_and_when_silencings_overlap(capsys: pytest.CaptureFixture[str]) -> None:
    own, began, ended = tqdm.__dict__["__init__"], threading.Event(), threading.Event()

    def meanwhile() -> None:
        with quiet_progress():
            began.set()
            assert ended.wait(60)

    other = threading.Thread(target=meanwhile)
    with suppress(ZeroDivisionError), quiet_progress():
        other.start()
        assert began.wait(60)
        raise ZeroDivisionError
    bar()
    assert not capsys.readouterr().err, "the other one is still silencing"
    ended.set()
    other.join()
    assert tqdm.__dict__["__init__"] is own
    bar()
    assert "somebody's bar: 100%" in capsys.readouterr().err
