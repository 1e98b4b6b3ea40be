"""An audit finds what was done to a run's rows, and finds nothing where nothing was done."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rayswift import api
from rayswift.cli import main
from rayswift.config.job import DataSource
from rayswift.data.stream import StreamPlan
from rayswift.data.stream_json import parse_stream, stream_json
from rayswift.errors import CheckpointError, DataError
from rayswift.training.run_dir import RunDir
from tests.audit_cases import FakeRun, copy_of, forge, newest_manifest, write_manifest
from tests.data_cases import make_tokenizer, pairs, plan_of, write_jsonl

TOKENIZER = make_tokenizer()
Tables = list[pa.Table]


def make_plan(folder: Path, **settings: Any) -> StreamPlan:
    """Two sources, one of them seen twice; two bad rows, and one that is too long."""
    long = {"question": "long?", "answer": "word " * 100}
    first = write_jsonl(folder / "first.jsonl", [*pairs(60), "{", long])
    second = write_jsonl(folder / "second.jsonl", [*pairs(20), "["])
    sources = [DataSource(path=str(first)), DataSource(path=str(second), weight=2)]
    return plan_of(*sources, **({"chunk_rows": 16, "max_length": 64} | settings))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs, trained on to their end by two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    run = FakeRun(folder / "finished", make_plan(folder, epochs=2), TOKENIZER)
    assert run.train(1000, ranks=2)
    return folder / "finished"


def test_a_whole_run_adds_up(finished: Path) -> None:
    report = api.audit(str(finished))
    report.check()
    first, second = report.sources
    assert (first.read, first.trained, first.truncated, first.quarantined, first.remaining) == (124, 122, 2, 2, 0)
    assert (second.read, second.trained, second.truncated, second.quarantined, second.remaining) == (84, 80, 0, 4, 0)
    assert (report.total.read, report.total.split, report.finished) == (208, 0, True)
    assert "each row was trained on or quarantined as often as planned" in report.summary()


def test_a_run_that_goes_on_has_rows_left(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, epochs=2, truncation="split")
    run = FakeRun(tmp_path / "run", plan, TOKENIZER)
    total = plan.num_rows_total
    lefts = []
    while not run.train(2, ranks=3 if len(lefts) % 2 else 1):
        report = api.audit(str(tmp_path / "run"))
        report.check()
        assert report.total.read + report.total.remaining == total
        lefts.append(report.total.remaining)
    assert lefts == sorted(lefts, reverse=True)
    assert lefts[0] > lefts[-1]
    last = api.audit(str(tmp_path / "run"))
    last.check()
    assert (last.total.remaining, last.total.split, last.total.truncated) == (0, 2, 0)


def without_a_row(tables: Tables) -> Tables:
    return [tables[0].slice(1), *tables[1:]]


def with_a_row_twice(tables: Tables) -> Tables:
    return [pa.concat_tables([tables[0].slice(0, 1), tables[0]]), *tables[1:]]


def with_another_row(tables: Tables) -> Tables:
    rows = tables[1].column("row").to_pylist()
    rows[0] = (rows[0] + 1) % 20
    return [tables[0], tables[1].set_column(5, "row", pa.array(rows)), *tables[2:]]


def with_a_row_that_is_none(tables: Tables) -> Tables:
    rows = tables[1].column("row").to_pylist()
    rows[0] = 4000
    return [tables[0], tables[1].set_column(5, "row", pa.array(rows)), *tables[2:]]


def with_a_step_again(tables: Tables) -> Tables:
    return [tables[0], pa.concat_tables([tables[1], tables[1]]), *tables[2:]]


def without_a_step(tables: Tables) -> Tables:
    return [tables[0], tables[1].slice(0, 0), *tables[2:]]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without_a_row, [r"row \d+ of .*\.jsonl \(sha256 \w{12}, source \d\) in epoch 1: trained on never"]),
        (with_a_row_twice, [r"in epoch 1: trained on (twice|3 times), quarantined never, planned (once|twice)"]),
        (with_another_row, [r"trained on (never|once), quarantined never, planned (once|twice)\n", r"(twice|3 times)"]),
        (with_a_row_that_is_none, [r"row 4000 of file \d in chunk \d+, which the stream does not have"]),
        (with_a_step_again, [r"step \d+ was trained on sequence \d+ of chunk \d+ where sequence \d+ of chunk \d+"]),
        (without_a_step, [r"step \d+ was trained on sequence", "trained on never"]),
    ],
)
def test_a_forged_record_is_found_and_its_rows_named(
    finished: Path, request: pytest.FixtureRequest, change: Callable[[Tables], Tables], told: list[str]
) -> None:
    run = forge(copy_of(finished, request.node.name), change)
    report = api.audit(str(run))
    text = "\n".join(report.problems)
    for pattern in told:
        assert re.search(pattern, text), text
    with pytest.raises(DataError, match="does not add up in"):
        report.check()


def test_a_changed_missing_or_unreadable_file_of_the_record_is_named(finished: Path) -> None:
    for number, (action, told) in enumerate(
        [
            (lambda path: path.write_bytes(path.read_bytes()[:-9] + b"x" + path.read_bytes()[-8:]), "was changed"),
            (lambda path: path.unlink(), "is missing"),
            (lambda path: path.write_bytes(b"no parquet"), "cannot be read"),
        ]
    ):
        run = copy_of(finished, f"file{number}")
        path = sorted((run / "rows").iterdir())[1]
        action(path)
        report = api.audit(str(run))
        assert any(told in problem and path.name in problem for problem in report.problems), report.problems


def test_a_record_of_another_stream_is_refused(finished: Path, tmp_path: Path) -> None:
    other = FakeRun(tmp_path / "other", make_plan(tmp_path, seed=7), TOKENIZER)
    other.train(2, ranks=1)
    run = copy_of(finished, "other_record")
    manifest = newest_manifest(run)
    foreign = other.head
    assert foreign is not None
    (run / foreign.name).write_bytes((tmp_path / "other" / foreign.name).read_bytes())
    place, ledger = RunDir(str(run)), replace(FakeRun(tmp_path / "new", parse_stream((run / "stream.json").read_text()),
                                                       TOKENIZER).ledger, **manifest.ledger)  # fmt: skip
    write_manifest(place, manifest.step, ledger, foreign, finished=True, epochs=2)
    assert any("is a record of another stream" in problem for problem in api.audit(str(run)).problems)
    (run / "stream.json").write_text((tmp_path / "other" / "stream.json").read_text())
    with pytest.raises(DataError, match=r"another stream than its stream\.json"):
        api.audit(str(run))


def test_counts_that_the_record_does_not_bear_out_are_told(finished: Path) -> None:
    run = copy_of(finished, "counts")
    path = sorted(run.glob("checkpoints/*/manifest.json"))[-1]
    plain = json.loads(path.read_text())
    plain["ledger"]["rows_trained"] += 1
    path.write_text(json.dumps(plain))
    assert api.audit(str(run)).problems == ("the checkpoint counts 203 rows trained on, its record has 202",)


def test_the_quarantine_and_the_record_agree(finished: Path) -> None:
    run = copy_of(finished, "quarantine")
    path = run / "quarantine.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 2
    lines[0]["row"] += 1000
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    problems = api.audit(str(run)).problems
    assert len(problems) == 2
    assert "was quarantined, and quarantine.jsonl does not have it" in problems[0]
    assert "which the stream does not have" in problems[1]


def test_a_run_without_a_record_cannot_be_proved(finished: Path, tmp_path: Path) -> None:
    run = copy_of(finished, "unrecorded")
    path = sorted(run.glob("checkpoints/*/manifest.json"))[-1]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rows": None}))
    assert "has no record of its rows" in api.audit(str(run)).problems[0]
    (run / "stream.json").unlink()
    with pytest.raises(DataError, match=r"lacks stream\.json"):
        api.audit(str(run))
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        api.audit(str(tmp_path))


def test_the_command_prints_the_rows_and_exits_with_4(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", "audit", str(finished), "--json"])
    plain = json.loads(capsys.readouterr().out)
    assert (ended.value.code, plain["total"]["trained"], plain["problems"]) == (0, 202, [])
    run = forge(copy_of(finished, "command"), without_a_row)
    with pytest.raises(SystemExit) as ended:
        main(["data", "audit", str(run)])
    printed = capsys.readouterr()
    assert ended.value.code == 4
    assert "does not add up: row " in printed.out
    assert "does not add up in" in printed.err


def test_a_plan_survives_json(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, epochs=3, loss_weights={r"\d+": 2})
    again = parse_stream(stream_json(plan))
    assert again == plan
    assert again.fingerprint == plan.fingerprint
    with pytest.raises(ValueError, match="files"):
        parse_stream("{}")
