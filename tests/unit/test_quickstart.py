"""The quickstart without its cluster: the corpus, the folder it claims, and the verdict on what was reached."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest

from rayswift.config.load import load_job
from rayswift.errors import ConfigError, ServeError
from rayswift.quickstart import MARKER, run_quickstart
from rayswift.quickstart.ask import Question, ask
from rayswift.quickstart.corpus import NUM_FACTS, first_sentence, topic_documents, write_corpus
from rayswift.quickstart.result import Answer, QuickstartResult
from rayswift.quickstart.text import NUM_ASKED, sample, write_jobs

RESULT = QuickstartResult(
    folder="q", num_params=1_300_000, num_train_rows=364, num_held_out_rows=64, held_out_before=6.6, held_out_after=0.1,
    asked=(Answer("Q?", "One two.", "One  two."),) * 10, tokens_per_second={"sft": 5000.0}, curves={"sft": "q/c.png"},
    export_max_difference=0.0, seconds={"pretrain": 60.0}, next_commands=("rayswift serve q",),
)  # fmt: skip


_OPENAI = openai.OpenAI


def rows(path: Path) -> list[tuple[str, str]]:
    messages = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    return [(user["content"], answer["content"]) for user, answer in messages]


def test_held_out_questions_are_new_but_their_facts_were_trained(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    train, held_out = rows(corpus.train), rows(corpus.held_out)
    assert len(corpus.facts) == NUM_FACTS >= 300
    assert len({fact.answer for fact in corpus.facts}) == len({fact.name for fact in corpus.facts}) == NUM_FACTS
    assert not {question for question, _ in train} & {question for question, _ in held_out}
    assert {answer for _, answer in held_out} <= {answer for _, answer in train}
    assert (len(train), len(held_out)) == (corpus.num_train_rows, corpus.num_held_out_rows)
    assert len(held_out) >= 32


def test_the_corpus_is_the_same_every_time(tmp_path: Path) -> None:
    one, two = write_corpus(tmp_path / "1"), write_corpus(tmp_path / "2")
    for a, b in ((one.text, two.text), (one.train, two.train), (one.held_out, two.held_out)):
        assert a.read_bytes() == b.read_bytes()


def test_documents_are_prose() -> None:
    documents = list(topic_documents())
    assert len(documents) > 50
    assert sum(map(len, documents)) > 300_000
    assert not any("****" in text or "====" in text for text in documents)


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the sum. Then rest.", "Return the sum."),
        ("f(x) -> int\n\nReturn the number\nof things.", "Return the number of things."),
        ("L.pop() -> item -- remove and return an item.", "remove and return an item."),
        ("no full stop", None),
        ("Für alle da und fertig.", None),
        ("", None),
        ("Too short.", None),
        (" ".join(["word"] * 40) + ".", None),
    ],
)
def test_the_first_sentence(docstring: str, sentence: str | None) -> None:
    assert first_sentence(docstring) == sentence


def test_the_written_jobs_are_ordinary_jobs(tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    corpus = write_corpus(folder / "data")
    write_jobs(folder, corpus)
    for name, method in (("pretrain", "pretrain"), ("sft", "sft")):
        job = load_job(str(folder / f"{name}.yaml")).job
        assert job.method.name == method
        assert job.run_dir == f"{folder}/runs/{name}"
        assert all(Path(source.path).is_file() for source in (*job.data.train, *job.data.eval))


def test_the_questions_asked_are_trained_ones_and_distinct(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    asked = sample(corpus.facts)
    assert len({fact.question for fact in asked}) == NUM_ASKED >= 40
    assert [fact.name for fact in asked[:3]] == ["str.upper", "len", "math.sqrt"]


def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter1.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(ConfigError, match="is not the folder of a quickstart"):
            run_quickstart("text", str(mine), force=force)
    assert (mine / "chapter1.txt").read_text() == "years of work"
    (mine / MARKER).write_text("")
    with pytest.raises(ConfigError, match="replace it with --force"):
        run_quickstart("text", str(mine))


def test_a_place_that_cannot_be_written_and_a_link_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output=.*/file/q cannot be written: Not a directory; name another folder"):
        run_quickstart("text", str(tmp_path / "file" / "q"))
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / MARKER).write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "earlier")
    with pytest.raises(ConfigError, match=r"output=.*/link is a link"):
        run_quickstart("text", str(tmp_path / "link"), force=True)
    assert (tmp_path / "earlier" / MARKER).is_file()


def test_a_key_that_cannot_be_one_is_told_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYSWIFT_API_KEY", "short")
    with pytest.raises(ConfigError, match="RAYSWIFT_API_KEY key 1 is not at least"):
        run_quickstart("text", str(tmp_path / "q"))
    assert not (tmp_path / "q").exists()


class _Upper(BaseHTTPRequestHandler):
    """Answers every chat completion with the last message in capitals."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        message = {"role": "assistant", "content": request["messages"][-1]["content"].upper()}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        body = json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]})
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        return None


def test_questions_do_not_go_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens on the discard port
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    questions = [Question("What does len do?", "Return the number."), Question("What does abs do?", "Be positive.")]
    with ThreadingHTTPServer(("127.0.0.1", 0), _Upper) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            answers = ask(f"http://127.0.0.1:{server.server_port}/v1", "m", questions)
        finally:
            server.shutdown()
            thread.join()
    assert [answer.answer for answer in answers] == ["WHAT DOES LEN DO?", "WHAT DOES ABS DO?"]


def test_an_endpoint_that_does_not_answer_is_a_serve_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "OpenAI", _without_retries)
    with pytest.raises(ServeError, match="did not answer"):
        ask("http://127.0.0.1:9/v1", "m", [Question("What does len do?", "Return the number.")])


def _without_retries(**options: Any) -> openai.OpenAI:
    return _OPENAI(**options | {"max_retries": 0})


def test_the_verdict() -> None:
    wrong = Answer("Q?", "One two.", "One three.")
    assert RESULT.succeeded
    assert "10 of 10" in RESULT.summary()
    assert replace(RESULT, asked=RESULT.asked[:8] + (wrong,) * 2).succeeded
    assert not replace(RESULT, asked=RESULT.asked[:7] + (wrong,) * 3).succeeded
    assert not replace(RESULT, held_out_after=7.0).succeeded
    assert not replace(RESULT, held_out_after=float("nan")).succeeded
    assert "FAILED" in replace(RESULT, held_out_after=7.0).summary()
    assert RESULT.to_plain()["num_exact"] == 10
