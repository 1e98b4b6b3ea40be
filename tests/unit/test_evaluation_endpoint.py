"""An endpoint as a target: a stand-in on this machine that speaks the protocol, asked by the official client."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayswift import api
from rayswift.errors import ConfigError, ServeError
from tests.endpoint_cases import KEY, StandIn, started


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYSWIFT_API_KEY", raising=False)


@pytest.fixture
def served() -> Iterator[StandIn]:
    yield from started(StandIn())


@pytest.fixture
def locked() -> Iterator[StandIn]:
    yield from started(StandIn(("demo", "other"), KEY))


def rows_of(path: Path, pairs: list[tuple[str, str]]) -> str:
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_answers_are_compared_and_there_is_no_loss(served: StandIn, tmp_path: Path) -> None:
    pairs = [("Say Paris", "Paris"), ("Say paris.", "Paris"), ("20+22 is 42", "6*7\n#### 42"), ("Say no", "yes"),
             ("too long", "x"), ("go on forever", "forever")]  # fmt: skip
    path = rows_of(tmp_path / "asked.jsonl", pairs)
    with open(path, "a") as stream:
        stream.write('{"messages": "none"}\n{"messages": [{"role": "user", "content": "only asked"}]}\n')
    report = api.evaluate(served.url, path, max_new_tokens=9)
    found = report.answers
    assert found is not None
    assert (found.num_answered, found.num_exact, found.num_judged, found.num_agreed) == (5, 2, 5, 4)
    assert (found.exact_match, found.accuracy, found.num_cut) == (2 / 5, 4 / 5, 1)
    assert found.unanswered == (f"{path}:5: is refused by the endpoint: too long, says the endpoint",)
    assert (report.loss, report.perplexity, report.tokens, report.trained_tokens) == (None, None, None, None)
    assert report.loss_reason == "an endpoint for chats gives no log-probabilities of prompts"
    assert (report.rows.read, report.rows.used, report.rows.refused) == (8, 6, 2)
    assert [reason.removeprefix(path)[:3] for reason in report.rows.reasons] == [":7:", ":8:"]
    assert (report.target.kind, report.target.model, report.target.path) == ("endpoint", "demo", served.url)
    assert all((body["temperature"], body["max_tokens"]) == (0, 9) for body in served.seen)
    assert "loss          not measured: an endpoint" in report.summary()
    assert not list(tmp_path.glob("eval-*"))


def test_a_server_that_reads_the_folders_penalties_is_asked_without_them(served: StandIn, tmp_path: Path) -> None:
    path, neutral = rows_of(tmp_path / "asked.jsonl", [("Say Paris", "Paris")]), {"repetition_penalty": 1}
    for owner, is_told in (("rayswift", True), ("vllm", True), ("openai", False)):
        served.owner = owner
        api.evaluate(served.url, path)
        body = served.seen[-1]
        assert ({name: body[name] for name in neutral if name in body} == neutral) is is_told
        assert (body.get("presence_penalty", 0), body.get("frequency_penalty", 0)) == (0, 0)


def test_an_endpoint_whose_list_of_models_is_none_is_asked_all_the_same(served: StandIn, tmp_path: Path) -> None:
    path = rows_of(tmp_path / "asked.jsonl", [("Say Paris", "Paris")])
    for listed in (["demo"], [1, 2], "<html>", {"data": [{"name": "a"}, {"name": "b"}]}):
        served.listed = listed
        report = api.evaluate(served.url, path, model="demo")
        assert report.answers is not None
        assert report.answers.exact_match == 1


def test_earlier_turns_are_sent_along(served: StandIn, tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "Two?"), ("assistant", "2"), ("user", "Say 3"), ("assistant", "3")]
    messages = [{"role": role, "content": text} for role, text in turns]
    path = tmp_path / "turns.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    report = api.evaluate(served.url, str(path))
    assert report.answers is not None
    assert report.answers.exact_match == 1
    assert served.seen[0]["messages"] == messages[:-1]


def test_what_is_not_sent_is_told(served: StandIn, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = {"role": "assistant", "content": "Say a"}
    tools = [{"role": "user", "content": "Do it"}, {"role": "assistant", "tool_calls": [call]},
             {"role": "tool", "content": "1"}, said]  # fmt: skip
    rows = [
        {"messages": tools},
        {"messages": [{"role": "user", "content": "<image>Who?"}, said], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": "Say b"}, said]},
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = api.evaluate(served.url, str(path))
    assert report.answers is not None
    assert (report.rows.used, report.answers.num_answered) == (3, 1)
    assert report.answers.unanswered == (
        f"{path}:1: has tools, which are not sent to an endpoint",
        f"{path}:2: has media, which are not sent to an endpoint",
    )


def test_the_key_is_sent_and_never_shown(locked: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rows_of(tmp_path / "asked.jsonl", [("Say a", "a")])
    with pytest.raises(ConfigError, match=r"RAYSWIFT_API_KEY is not set, and a key is asked for by http://.* \(401\)"):
        api.evaluate(locked.url, path)
    monkeypatch.setenv("RAYSWIFT_API_KEY", "another-key-of-mine")
    with pytest.raises(ConfigError, match="RAYSWIFT_API_KEY is refused by") as caught:
        api.evaluate(locked.url, path, model="demo")
    assert "another-key-of-mine" not in str(caught.value)
    monkeypatch.setenv("RAYSWIFT_API_KEY", KEY)
    with pytest.raises(ConfigError, match=r"--model is needed: .* serves demo, other; write --model demo"):
        api.evaluate(locked.url, path)
    report = api.evaluate(locked.url, path, model="other")
    assert (report.target.model, KEY in report.model_dump_json()) == ("other", False)


def test_what_the_endpoint_does_not_know_is_told(served: StandIn, tmp_path: Path) -> None:
    path = rows_of(tmp_path / "asked.jsonl", [("Say a", "a")])
    with pytest.raises(
        ConfigError, match="answers 404: The model does not exist; give the base URL, which ends in /v1"
    ):
        api.evaluate(served.url, path, model="absent")
    with pytest.raises(ServeError, match=re.escape(f"TARGET={served.url} does not answer: break, says")):
        api.evaluate(served.url, rows_of(tmp_path / "broken.jsonl", [("break", "a")] * 20))


def test_an_endpoint_that_is_not_there_is_a_failure_and_no_bad_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayswift.serving.client.RETRIES", 0)
    gone = StandIn()
    gone.server_close()
    with pytest.raises(ServeError, match="does not answer: Connection error") as caught:
        api.evaluate(gone.url, rows_of(tmp_path / "asked.jsonl", [("Say a", "a")]))
    assert caught.value.exit_code == 1
