"""Verification prompts: those of a row file, of the rows that an export's job held out, and plain ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayswift.errors import ConfigError
from rayswift.serving import questions
from rayswift.serving.questions import Kind, Question, kind_of, of_export, of_rows


def _rows(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _turn(user: str, assistant: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def test_the_first_questions_of_a_file_with_their_answers(tmp_path: Path) -> None:
    rows = _rows(tmp_path / "rows.jsonl", _turn("1+1", "2"), _turn("1+2", "3"), _turn("1+3", "4"))
    assert of_rows(rows, 2, 8, "chat") == [
        Question([{"role": "user", "content": "1+1"}], "2", 8),
        Question([{"role": "user", "content": "1+2"}], "3", 8),
    ]


def test_rows_that_are_no_conversations_of_text_are_refused(tmp_path: Path) -> None:
    texts = _rows(tmp_path / "texts.jsonl", {"text": "a b c"}, {"text": "d e f"})
    with pytest.raises(ConfigError, match=r"--prompts=.*has no conversation of text with an answer; give rows"):
        of_rows(texts, 2, 8, "chat")


def test_a_model_without_a_chat_template_continues_texts_and_one_that_embeds_reads_all_of_them(tmp_path: Path) -> None:
    rows = _rows(tmp_path / "rows.jsonl", {"text": "once upon a time"}, {"text": "x"}, {"text": "y" * 5000})
    assert of_rows(rows, 4, 8, "text") == [Question("once upo", None, 8), Question("y" * 1000, None, 8)]
    assert [one.text for one in of_rows(rows, 2, 8, "vectors")] == ["once upon a time", "x"]
    chats = _rows(tmp_path / "chats.jsonl", _turn("1+1", "2"), _turn("1+2", "3"))
    for kind in ("text", "vectors"):
        asked: Kind = kind  # type: ignore[assignment]
        assert of_rows(chats, 4, 8, asked) == [Question("1+1", None, 8), Question("1+2", None, 8)]
    empty = _rows(tmp_path / "empty.jsonl", {"text": "x"}, {"text": "z"})
    with pytest.raises(ConfigError, match=r"--prompts=.*has no text; give rows"):
        of_rows(empty, 4, 8, "text")  # nothing is left of half a letter


def test_what_is_said_last_is_the_text_of_a_question() -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert (Question(chat, None, 8).text, Question("d", None, 8).text) == ("c", "d")


def test_a_text_is_cut_to_the_bytes_that_there_are_tokens_for_and_a_conversation_is_not() -> None:
    for text, within in [("abcdefgh", "abcd"), ("abc", "abc"), ("aé€x", "aé"), ("😀x", "😀")]:
        assert Question(text, None, 8).within(4) == Question(within, None, 8)
    chat = Question([{"role": "user", "content": "abcdefgh"}], None, 8)
    assert chat.within(4) is chat


def test_what_versions_are_asked_is_told_by_the_files_of_both(tiny_model_dir: Path, tmp_path: Path) -> None:
    chats = str(tiny_model_dir)
    assert kind_of(chats, chats) == "chat"
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model_dir, bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    assert kind_of(str(bare), chats) == kind_of(chats, str(bare)) == "text"
    (bare / "modules.json").write_text(
        json.dumps([
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ])
    )  # fmt: skip
    (bare / "1_Pooling").mkdir()
    (bare / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    assert kind_of(str(bare), chats) == kind_of(chats, str(bare)) == "vectors"
    for folders, field in (((tmp_path / "absent", bare), "EXPORT="), ((chats, tmp_path / "absent"), "live=")):
        with pytest.raises(ConfigError, match=field):
            kind_of(*map(str, folders))


def _trained(monkeypatch: pytest.MonkeyPatch, *sources: str) -> None:
    job = {"data": {"eval": [{"path": source} for source in sources]}}
    monkeypatch.setattr(questions, "read", lambda folder: SimpleNamespace(lineage=SimpleNamespace(job=job)))


def test_an_export_is_asked_what_its_job_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = _rows(tmp_path / "held_out.jsonl", _turn("1+1", "2"))
    texts = _rows(tmp_path / "texts.jsonl", {"text": "a b c d"}, {"text": "d e f g"})
    _trained(monkeypatch, str(tmp_path / "elsewhere.jsonl"), texts, held_out)
    found, place = of_export("exports/v2", 4, 8, "chat")
    assert (found, place) == ([Question([{"role": "user", "content": "1+1"}], "2", 8)], held_out)
    assert of_export("exports/v2", 4, 8, "text") == ([Question("a b", None, 8), Question("d e", None, 8)], texts)


@pytest.mark.parametrize("lineage", [None, SimpleNamespace(job={}), SimpleNamespace(job={"data": {"eval": None}})])
def test_an_export_without_held_out_rows_is_asked_plain_questions(
    monkeypatch: pytest.MonkeyPatch, lineage: object
) -> None:
    monkeypatch.setattr(questions, "read", lambda folder: SimpleNamespace(lineage=lineage))
    found, place = of_export("exports/v2", 4, 8, "chat")
    assert place == "plain prompts"
    assert len(found) == 4
    assert all(one.expected is None and one.max_new_tokens == 8 for one in found)
    assert found[0].asked == [{"role": "user", "content": "Hello"}]
    assert of_export("exports/v2", 4, 8, "vectors")[0][0].asked == "Hello"
