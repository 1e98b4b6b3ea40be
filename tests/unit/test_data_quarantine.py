"""The error budget, and a quarantine file that survives a crash."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rayswift.config.job import DataSource
from rayswift.data.quarantine import Quarantine, check
from rayswift.data.sources import index_sources, read_rows
from rayswift.data.types import BadRow
from rayswift.errors import DataError
from tests.data_cases import write_jsonl


def bad(row: int, line: int | None = None) -> BadRow:
    return BadRow("a.jsonl", row, line, "has no `messages`", "é")


def test_the_budget_is_a_fraction_of_an_epoch() -> None:
    check([bad(0)], 100, 0.01)
    check([], 0, 0.0)
    with pytest.raises(DataError) as caught:
        check([bad(i, i + 1) for i in range(5)], 100, 0.01)
    assert str(caught.value) == (
        "5 of 100 rows are bad, more than data.max_bad_fraction=0.01 allows: a.jsonl:1: has no `messages`; "
        "a.jsonl:2: has no `messages`; a.jsonl:3: has no `messages`; and 2 more; "
        "repair them, or raise data.max_bad_fraction"
    )
    assert caught.value.exit_code == 4


def test_every_row_is_kept_once_and_the_file_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    first = Quarantine(str(path), 100, 0.02)
    first.add([])
    assert not path.exists()
    first.add([bad(3, 4), bad(3, 4)])
    first.add([bad(3, 4)])
    with path.open("a") as stream:
        stream.write('{"file": "a.js')
    second = Quarantine(str(path), 100, 0.02)
    assert second.rows == (bad(3, 4),)
    second.add([bad(7)])
    assert [BadRow(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()] == [bad(3, 4), bad(7)]
    with pytest.raises(DataError, match=r"3 of 100 .*a\.jsonl row 7"):
        second.add([bad(8)])
    assert len(path.read_text().splitlines()) == 3, "the rows that broke the budget can be looked at"


def test_a_run_resumed_from_another_folder_counts_a_row_once(tmp_path: Path) -> None:
    for session in "12":
        folder = tmp_path / f"working_dir_{session}"
        folder.mkdir()
        rows = ["{", *({"text": "a"} for _ in range(49))]
        (file,) = index_sources([DataSource(path=str(write_jsonl(folder / "a.jsonl", rows)))])
        found = [row for span in file.spans for _, _, row in read_rows(file, span) if isinstance(row, BadRow)]
        quarantine = Quarantine(str(tmp_path / "run" / "quarantine.jsonl"), 50, 0.02)
        quarantine.add(found)
    assert len(quarantine.rows) == 1
    with pytest.raises(DataError, match="2 of 50"):
        quarantine.add([replace(found[0], sha256="of another a.jsonl")])


def test_a_crash_while_writing_forgets_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "quarantine.jsonl"
    first = Quarantine(str(path), 100, 1.0)
    first.add([bad(n) for n in range(5)])

    def power_cut(fd: int) -> None:
        raise OSError("power cut")

    monkeypatch.setattr("os.fsync", power_cut)
    with pytest.raises(OSError, match="power cut"):
        first.add([bad(5)])
    assert [row.row for row in Quarantine(str(path), 100, 1.0).rows] == [0, 1, 2, 3, 4]
