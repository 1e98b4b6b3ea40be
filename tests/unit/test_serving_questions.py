"""Verification prompts: those of a row file, of the rows that an export's job held out, and plain ones."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayswift.errors import ConfigError
from rayswift.serving import questions
from rayswift.serving.questions import Question, of_export, of_rows


def _rows(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _turn(user: str, assistant: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def test_the_first_questions_of_a_file_with_their_answers(tmp_path: Path) -> None:
    rows = _rows(tmp_path / "rows.jsonl", _turn("1+1", "2"), _turn("1+2", "3"), _turn("1+3", "4"))
    assert of_rows(rows, 2, 8) == [
        Question([{"role": "user", "content": "1+1"}], "2", 8),
        Question([{"role": "user", "content": "1+2"}], "3", 8),
    ]


def test_rows_that_are_no_conversations_of_text_are_refused(tmp_path: Path) -> None:
    texts = _rows(tmp_path / "texts.jsonl", {"text": "a b c"}, {"text": "d e f"})
    with pytest.raises(ConfigError, match=r"--prompts=.*has no conversation of text with an answer; give rows"):
        of_rows(texts, 2, 8)


def _trained(monkeypatch: pytest.MonkeyPatch, *sources: str) -> None:
    job = {"data": {"eval": [{"path": source} for source in sources]}}
    monkeypatch.setattr(questions, "read", lambda folder: SimpleNamespace(lineage=SimpleNamespace(job=job)))


def test_an_export_is_asked_what_its_job_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = _rows(tmp_path / "held_out.jsonl", _turn("1+1", "2"))
    texts = _rows(tmp_path / "texts.jsonl", {"text": "a b c"})
    _trained(monkeypatch, str(tmp_path / "elsewhere.jsonl"), texts, held_out)
    found, place = of_export("exports/v2", 4, 8)
    assert (found, place) == ([Question([{"role": "user", "content": "1+1"}], "2", 8)], held_out)


@pytest.mark.parametrize("lineage", [None, SimpleNamespace(job={}), SimpleNamespace(job={"data": {"eval": None}})])
def test_an_export_without_held_out_rows_is_asked_plain_questions(
    monkeypatch: pytest.MonkeyPatch, lineage: object
) -> None:
    monkeypatch.setattr(questions, "read", lambda folder: SimpleNamespace(lineage=lineage))
    found, place = of_export("exports/v2", 4, 8)
    assert place == "plain prompts"
    assert len(found) == 4
    assert all(one.expected is None and one.max_new_tokens == 8 for one in found)
