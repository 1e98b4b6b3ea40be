"""Tasks of the lm-evaluation-harness asked of an endpoint: what is sent, what counts, and what is refused."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayswift import api
from rayswift.errors import ConfigError, ServeError
from tests.endpoint_cases import KEY, StandIn, started
from tests.harness_cases import QUESTIONS, write_answer, write_choice, write_task

pytest.importorskip("lm_eval", reason="needs the extra `harness`")
WORDS = [question.split()[-1] for question in QUESTIONS]  # what the stand-in answers


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key of ours, one that the harness sends if it is let, and one try."""
    monkeypatch.delenv("RAYSWIFT_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("rayswift.serving.client.RETRIES", 1)


@pytest.fixture
def served() -> Iterator[StandIn]:
    yield from started(StandIn())


@pytest.fixture
def locked() -> Iterator[StandIn]:
    yield from started(StandIn(("demo",), KEY))


@pytest.mark.parametrize("is_chat", [True, False])
def test_answers_are_compared(served: StandIn, tmp_path: Path, is_chat: bool) -> None:
    write_answer(tmp_path / "tasks", [*WORDS[:6], "wrong", "wrong"])
    report = api.evaluate(
        served.url, tasks=("own_answer",), include_path=str(tmp_path / "tasks"),
        chat_template=None if is_chat else False,
    )  # fmt: skip
    assert report.harness is not None
    (found,) = report.harness.tasks
    assert ([score.value for score in found.scores], found.num_samples) == ([6 / 8], 8)
    assert (report.harness.chat_template, report.target.kind, report.target.model) == (is_chat, "endpoint", "demo")
    assert (report.rows, report.loss_reason) == (None, "no rows were given")
    said = [body["messages"] if is_chat else body["prompt"] for body in served.seen]
    expected: list[Any] = [[{"role": "user", "content": text}] if is_chat else text for text in QUESTIONS]
    assert sorted(map(str, said)) == sorted(map(str, expected))
    assert all((body["temperature"], body["max_tokens"], body["stop"]) == (0, 12, ["\n\n"]) for body in served.seen)


@pytest.mark.parametrize("is_chat", [True, False])
def test_more_stop_texts_than_the_api_takes_end_answers_too(served: StandIn, tmp_path: Path, is_chat: bool) -> None:
    stops = ["1", "2", "3", "4", "lass"]
    write_answer(tmp_path / "tasks", ["c"] * 8, generation_kwargs={"until": stops, "max_gen_toks": 9})
    report = api.evaluate(
        served.url, tasks=("own_answer",), include_path=str(tmp_path / "tasks"), chat_template=is_chat
    )
    assert report.harness is not None
    assert report.harness.tasks[0].scores[0].value == 1 / 8  # "Name a class"
    assert all(body["stop"] == stops[:4] for body in served.seen)


def test_examples_are_turns_of_a_chat(served: StandIn, tmp_path: Path) -> None:
    rows = [{"q": "Say a", "a": "b"}, {"q": "Say c", "a": "c"}]
    write_task(
        tmp_path / "tasks", "own_shots", rows, output_type="generate_until", doc_to_target="{{a}}", num_fewshot=1,
        fewshot_split="test", fewshot_config={"sampler": "first_n"}, description="Be brief. ", target_delimiter=" ",
        generation_kwargs={"until": ["\n"]}, metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    report = api.evaluate(served.url, tasks=("own_shots",), include_path=str(tmp_path / "tasks"), limit=2)
    assert report.harness is not None
    assert report.harness.tasks[0].num_fewshot == 1
    roles = [[turn["role"] for turn in body["messages"]] for body in served.seen]
    assert roles == [["system", "user", "assistant", "user"]] * 2


def test_what_needs_log_probabilities_is_refused_before_anything_is_asked(served: StandIn, tmp_path: Path) -> None:
    write_choice(tmp_path / "tasks", [0] * 8)
    write_answer(tmp_path / "tasks", WORDS)
    with pytest.raises(ConfigError, match="needs log-probabilities of prompts for own_choice, which the endpoint") as e:
        api.evaluate(served.url, tasks=("own_answer", "own_choice"), include_path=str(tmp_path / "tasks"))
    assert e.value.exit_code == 2
    assert served.seen == []


def test_the_key_is_sent_and_never_shown(
    locked: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_answer(tmp_path / "tasks", [*WORDS[:-1], "break"])
    options: dict[str, Any] = {"tasks": ("own_answer",), "include_path": str(tmp_path / "tasks"), "model": "demo"}
    for key in (None, "a-wrong-key"):
        if key:
            monkeypatch.setenv("RAYSWIFT_API_KEY", key)
        with pytest.raises(
            ConfigError, match=r"RAYSWIFT_API_KEY is not set, or is refused by http.* \(401\)"
        ) as caught:
            api.evaluate(locked.url, **options)
        assert KEY not in str(caught.value)
    gc.collect()
    assert "never retrieved" not in caplog.text  # the requests beside the one that is told
    monkeypatch.setenv("RAYSWIFT_API_KEY", KEY)
    report = api.evaluate(locked.url, **options)
    assert report.harness is not None
    assert report.harness.tasks[0].scores[0].value == 7 / 8
    assert KEY not in report.model_dump_json()


@pytest.mark.parametrize("question", ["break", "too long"])
def test_a_failing_endpoint_is_told(
    served: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, question: str
) -> None:
    monkeypatch.setenv("RAYSWIFT_API_KEY", KEY)
    write_task(
        tmp_path / "tasks", "own_bad", [{"q": question}], output_type="generate_until", doc_to_target="a",
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    options: dict[str, Any] = {"tasks": ("own_bad",), "include_path": str(tmp_path / "tasks")}
    with pytest.raises(ServeError, match=f"refuses to answer: .*{question}, says the endpoint") as caught:
        api.evaluate(served.url, **options)
    assert KEY not in str(caught.value)
    gone = StandIn()
    gone.server_close()
    with pytest.raises(ServeError, match=re.escape(f"TARGET={gone.url} does not answer: ClientConnectorError")):
        api.evaluate(gone.url, model="demo", **options)
