"""Every format: found by its columns, normalised to the same Sample, refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayswift import plugins
from rayswift.config.job import DataSource
from rayswift.data.detect import detect, load_format, normalise
from rayswift.data.formats import RowError
from rayswift.data.inspect import preflight
from rayswift.data.media import MARKS
from rayswift.data.sources import index_sources, read_rows
from rayswift.data.types import Medium, Message, Sample
from rayswift.errors import ConfigError, DataError
from tests.data_cases import write_jsonl

USER, ANSWER = Message("user", "hi"), Message("assistant", "yo")
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
PARTS = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
OPENAI_CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
CALL = {"name": "f", "arguments": {"x": 1}}
GOOD: list[tuple[str, dict[str, Any], Sample]] = [
    ("alpaca", {"instruction": "hi", "input": "", "output": "yo"}, Sample((USER, ANSWER))),
    ("alpaca", {"instruction": "hi", "output": "yo", "text": "all of it"}, Sample((USER, ANSWER))),
    (
        "alpaca",
        {"instruction": "a", "input": "b", "output": "yo", "system": "s", "history": [["hi", "yo"]]},
        Sample((Message("system", "s"), USER, ANSWER, Message("user", "a\nb"), ANSWER)),
    ),
    ("sharegpt", {"conversations": SHAREGPT, "tools": "[]"}, Sample((USER, ANSWER))),
    ("sharegpt", {"conversations": TURNS, "system": "s"}, Sample((Message("system", "s"), USER, ANSWER))),
    (
        "sharegpt",
        {
            "conversations": [
                SHAREGPT[0],
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "2"},
                SHAREGPT[1],
            ],
            "tools": json.dumps([{"name": "f"}]),
        },
        Sample(
            (USER, Message("tool_call", json.dumps(CALL)), Message("tool", "2"), ANSWER),
            tools=({"type": "function", "function": {"name": "f"}},),
        ),
    ),
    (
        "captioned",
        {"images": ["1.jpg"], "text": "yo", "question": "<image>hi"},
        Sample((Message("user", f"{MARKS['image']}hi", media=(Medium("image", "1.jpg"),)), ANSWER)),
    ),
    ("messages", {"messages": TURNS}, Sample((USER, ANSWER))),
    ("messages", {"messages": json.dumps(TURNS), "id": 7}, Sample((USER, ANSWER))),
    ("messages", {"messages": [{**one, "role": None, "content": None, "loss": None} for one in SHAREGPT]},
     Sample((USER, ANSWER))),
    (
        "messages",
        {"messages": [{**TURNS[0], "loss": True}, {**TURNS[1], "weight": 0}, *TURNS]},
        Sample((Message("user", "hi", True), Message("assistant", "yo", False), USER, ANSWER)),
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": PARTS}, TURNS[1]]},
        Sample((USER, ANSWER)),
    ),
    (
        "messages",
        {"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]}]},
        Sample((USER, Message("tool_call", json.dumps(CALL)))),
    ),
    ("query_response", {"query": "hi", "response": "yo"}, Sample((USER, ANSWER))),
    (
        "preference",
        {"prompt": "hi", "chosen": "yo", "rejected": "no"},
        Sample((USER, ANSWER), rejected=(USER, Message("assistant", "no"))),
    ),
    ("query_response", {"instruction": "a", "input": "b", "response": "yo"}, Sample((Message("user", "a\nb"), ANSWER))),
    ("query_response", {"instruction": "a", "context": "b", "response": "yo", "category": "c"},
     Sample((Message("user", "a\nb"), ANSWER))),
    ("query_response", {"question": "a", "context": "", "query": None, "answer": "yo"},
     Sample((Message("user", "a"), ANSWER))),
    ("query_response", {"input": "hi", "target": "yo"}, Sample((USER, ANSWER))),
    ("query_response", {"problem": "hi", "solution": "yo"}, Sample((USER, ANSWER))),
    ("query_response", {"question": "hi", "completion": "yo"}, Sample((USER, ANSWER))),
    ("alpaca", {"instruction": "a", "context": "b", "output": "yo"}, Sample((Message("user", "a\nb"), ANSWER))),
    ("query_response", {"question": "hi", "answer": "yo"}, Sample((USER, ANSWER))),
    ("query_response", {"prompt": "hi", "response": "yo", "history": [["hi", "yo"]]}, Sample((USER, ANSWER) * 2)),
    ("prompt_completion", {"prompt": "hi", "completion": "yo"}, Sample((USER, ANSWER))),
    ("prompt_completion", {"prompt": TURNS[:1], "completion": TURNS[1:]}, Sample((USER, ANSWER))),
    ("text", {"text": "once", "url": "u"}, Sample(text="once")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "expected"), GOOD)
def test_a_good_row_is_detected_and_normalised(name: str, row: dict[str, Any], expected: Sample) -> None:
    assert detect([row]) == name
    assert normalise(row, name, DataSource(path="x")) == expected


def test_every_format_has_a_good_row_here() -> None:
    assert {name for name, _, _ in GOOD} == set(plugins.names("data.formats"))


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("alpaca", {"instruction": "", "input": " ", "output": "x"}, "`instruction` is empty"),
        ("alpaca", {"instruction": "a", "output": ""}, "`output` is empty"),
        ("alpaca", {"instruction": "a"}, "`output` is missing"),
        ("alpaca", {"instruction": 3, "output": "x"}, "`instruction` is a number, not text"),
        ("alpaca", {"instruction": "a", "output": "x", "history": ["q"]}, "not a list of [question, answer] pairs"),
        (
            "alpaca",
            {"instruction": "<image>a", "output": "x", "images": []},
            "1 places for images (<image>) and 0 images",
        ),
        ("text", {"text": "a", "images": ["p.png"]}, "has `images`, and as plain text only text"),
        ("sharegpt", {"conversations": []}, "has no `conversations`"),
        ("sharegpt", {"conversations": "hello"}, "not the JSON of a list"),
        ("sharegpt", {"conversations": [{"from": "martian", "value": "x"}]}, "turn 1 has the role 'martian'"),
        ("sharegpt", {"conversations": SHAREGPT[:1]}, "ends with a turn of user"),
        ("sharegpt", {"conversations": SHAREGPT[1:]}, "turn 1 is assistant first; expected system or user"),
        ("sharegpt", {"conversations": [SHAREGPT[0], *SHAREGPT]}, "turn 2 is user after user"),
        ("sharegpt", {"conversations": SHAREGPT, "tools": "{"}, "`tools` is text, and not the JSON"),
        ("sharegpt", {"conversations": [SHAREGPT[0], {"from": "function_call", "value": "{}"}]}, "without a name"),
        ("messages", {}, "has no `messages`"),
        ("messages", {"messages": None}, "has no `messages`"),
        ("messages", {"messages": {"role": "user"}}, "`messages` is an object, not a list"),
        ("messages", {"messages": ["hi"]}, "turn 1 is text, not an object"),
        ("messages", {"messages": [{"role": "user", "content": 5}]}, "`content of turn 1` is a number, not text"),
        ("messages", {"messages": [TURNS[0], {"role": "assistant", "content": " "}]}, "turn 2, an answer"),
        ("messages", {"messages": [TURNS[0], {**TURNS[1], "loss": "no"}]}, "`loss` of turn 2 is 'no'"),
        ("messages", {"messages": [TURNS[0], {**TURNS[1], "loss_scale": -1}]}, "`loss_scale` of turn 2 is -1"),
        ("messages", {"messages": [TURNS[0], {**TURNS[1], "weight": float("nan")}]}, "`weight` of turn 2 is nan"),
        (
            "messages",
            {"messages": [{**TURNS[0], "reasoning_content": "x"}, TURNS[1]]},
            "turn 1 has `reasoning_content`",
        ),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "has a part that is neither"),
        (
            "messages",
            {"messages": TURNS, "tools": [{"type": "function", "function": None}]},
            "tool 1 of `tools` has no",
        ),
        ("messages", {"messages": TURNS, "tools": [{"name": "f"}, {"function": "f"}]}, "tool 2 of `tools` has no"),
        ("messages", {"messages": TURNS, "tools": [{"function": {"name": 3}}]}, "tool 1 of `tools` has no"),
        ("query_response", {"query": "a", "response": None}, "`response` is missing"),
        ("query_response", {"query": "a", "question": "b", "response": "c"}, "has both `query` and `question`"),
        ("query_response", {"problem": "a", "answer": "b", "solution": "c"}, "has both `answer` and `solution`"),
        ("query_response", {"question": "a", "context": ["b"], "answer": "c"}, "`context` is a list, not text"),
        ("query_response", {"input": " ", "context": "b", "target": "c"}, "`input` is empty"),
        ("query_response", {"query": "a", "response": 42}, "`response` is a number, not text"),
        ("prompt_completion", {"prompt": "a", "completion": ""}, "`completion` is empty"),
        ("text", {"text": "  \n"}, "`text` is empty"),
        ("text", {"text": ["a"]}, "`text` is a list, not text"),
    ],
)
def test_a_bad_row_says_what_is_wrong(name: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        load_format(name).normalise(row)
    assert reason in str(caught.value)


def test_whatever_a_format_raises_is_the_rows_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayswift.data.formats.text.required", lambda value, name: value["no"][name])
    with pytest.raises(RowError, match="TypeError: string indices must be integers"):
        normalise({"text": "a"}, "text", DataSource(path="x"))


def test_unknown_and_ambiguous_columns() -> None:
    with pytest.raises(
        ConfigError,
        match=r"data\.train\.0\.format=auto found no format for the columns a, b; .*columns: \{a: text\}.*alpaca",
    ):
        detect([{"a": 1}, {"b": 2}])
    with pytest.raises(
        ConfigError, match="is ambiguous for the columns conversations, messages; set messages or sharegpt"
    ):
        detect([{"messages": [], "conversations": []}])
    with pytest.raises(ConfigError, match="did you mean alpaca"):
        load_format("alpacca")


def test_columns_are_renamed_and_a_system_message_is_put_in_front() -> None:
    source = DataSource(path="x", columns={"frage": "query", "antwort": "response"}, system="be brief")
    assert normalise({"frage": "hi", "antwort": "yo"}, "query_response", source).messages == (
        Message("system", "be brief"), USER, ANSWER,
    )  # fmt: skip
    own = normalise({"messages": [{"role": "system", "content": "s"}, *TURNS]}, "messages", source)
    assert own.messages[0] == Message("system", "s")


@pytest.mark.parametrize(
    ("name", "format_name", "num_rows"),
    [
        ("llamafactory_demo/alpaca_en_demo.json", "alpaca", 999),
        ("llamafactory_demo/identity.json", "alpaca", 91),
        ("llamafactory_demo/glaive_toolcall_en_demo.json", "sharegpt", 300),
        ("llamafactory_demo/c4_demo.jsonl", "text", 300),
        ("llamafactory_demo/wiki_demo.txt", "text", 30),
        ("gsm8k/train.jsonl", "query_response", 7473),
        ("llamafactory_demo/kto_en_demo.json", "messages", 300),
    ],
)
def test_real_files_need_no_converter(shared_data: Path, name: str, format_name: str, num_rows: int) -> None:
    source = DataSource(path=str(shared_data / name))
    files = index_sources([source])
    assert preflight([source], files) == (format_name,)
    samples = [normalise(row, format_name, source) for s in files[0].spans for _, _, row in read_rows(files[0], s)]  # type: ignore[arg-type]
    assert len(samples) == files[0].num_rows == num_rows


def test_preflight_refuses_empty_and_useless_data(tmp_path: Path) -> None:
    def look(*rows: Any, **source: Any) -> tuple[str, ...]:
        given = [DataSource(path=str(write_jsonl(tmp_path / "a.jsonl", rows)), **source)]
        return preflight(given, index_sources(given))

    with pytest.raises(ConfigError, match=r"data\.train\.0\.path=.*a\.jsonl has no rows"):
        look()
    with pytest.raises(DataError, match=r"none of the first 2 rows.*a\.jsonl:1: is not JSON.*a\.jsonl:2: is not JSON"):
        look("{", "nope")
    with pytest.raises(DataError, match=r"a\.jsonl:1: has no `messages`"):
        look({"messages": []})
    with pytest.raises(ConfigError, match=r"data\.train\.0\.format=mesages is not one of.*did you mean messages"):
        look({"messages": TURNS}, format="mesages")
    assert look("{", {"messages": TURNS}) == ("messages",)


def test_the_driver_side_loads_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; import rayswift.data.inspect, rayswift.data.stream, rayswift.data.prepare;"
        "print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
