"""Preference pairs in every usual shape are one Sample; what an undesirable answer is to supervised fine-tuning."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rayswift.config.job import DataSource
from rayswift.data.detect import detect, normalise
from rayswift.data.formats import RowError
from rayswift.data.prepare import prepare_chunk
from rayswift.data.quarantine import check
from rayswift.data.types import BadRow, Message, Sample
from rayswift.errors import DataError
from tests.data_cases import CHATML, make_tokenizer, plan_of, write_jsonl

USER = Message("user", "hi")
BOTH = Sample((USER, Message("assistant", "yo")), rejected=(USER, Message("assistant", "go away")))
ASKED = [{"role": "user", "content": "hi"}]
YO, GO = {"role": "assistant", "content": "yo"}, {"role": "assistant", "content": "go away"}
GPT_YO, GPT_GO = {"from": "gpt", "value": "yo"}, {"from": "gpt", "value": "go away"}
SHAPES: dict[str, dict[str, Any]] = {
    "trl texts": {"prompt": "hi", "chosen": "yo", "rejected": "go away"},
    "trl turns": {"prompt": ASKED, "chosen": [YO], "rejected": [GO]},
    "trl, the prompt in both": {"chosen": [*ASKED, YO], "rejected": [*ASKED, GO], "score": 1.0},
    "llamafactory sharegpt": {
        "conversations": [{"from": "human", "value": "hi"}],
        "chosen": GPT_YO,
        "rejected": GPT_GO,
    },
    "llamafactory alpaca": {"instruction": "hi", "input": "", "chosen": "yo", "rejected": "go away"},
    "ms-swift response": {"messages": [*ASKED, YO], "rejected_response": "go away"},
    "ms-swift messages": {"messages": [*ASKED, YO], "rejected_messages": [*ASKED, GO]},
    "ms-swift, the answer only": {"messages": [*ASKED, YO], "rejected_messages": [GO], "rejected_response": None},
}


@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES)
def test_every_shape_is_the_same_pair(row: dict[str, Any]) -> None:
    assert detect([row]) == "preference"
    assert normalise(row, "preference", DataSource(path="x")) == BOTH
    system = Message("system", "be brief")
    found = normalise(row, "preference", DataSource(path="x", system="be brief"))
    assert (found.messages, found.rejected) == ((system, *BOTH.messages), (system, *BOTH.rejected))


def test_calls_of_tools_belong_to_the_answer() -> None:
    call = {"role": "tool_call", "content": json.dumps({"name": "f", "arguments": {}})}
    row = {"messages": [*ASKED, call, {"role": "tool", "content": "2"}, YO], "rejected_response": "go away"}
    assert normalise(row, "preference", DataSource(path="x")).rejected == BOTH.rejected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "hi", "chosen": "yo", "rejected": "yo"}, "the same answer"),
        ({"prompt": "hi", "chosen": "yo", "rejected": ""}, "`rejected` is empty"),
        ({"prompt": "hi", "chosen": "yo", "rejected": None}, "`rejected` is missing"),
        ({"chosen": "yo", "rejected": "go away"}, "`query` is missing"),
        ({"chosen": [*ASKED, YO], "rejected": [{"role": "user", "content": "ho"}, GO]}, "the same conversation"),
        ({"messages": [*ASKED, YO], "rejected_response": ""}, "`rejected_response` is empty"),
        ({"prompt": ASKED, "chosen": [YO], "rejected": [*ASKED]}, "turn 2 is user after user"),
    ],
)
def test_what_is_no_pair_is_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=re.escape(reason)):
        normalise(row, "preference", DataSource(path="x"))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*ASKED, YO], "label": False},
        {"prompt": "hi", "completion": "yo", "label": False},
        {"conversations": [{"from": "human", "value": "hi"}, GPT_YO], "label": False},
    ],
)
def test_a_label_is_read_from_every_format(row: dict[str, Any]) -> None:
    assert normalise(row, detect([row]), DataSource(path="x")) == Sample(BOTH.messages, label=False)


def test_a_class_is_no_label() -> None:
    assert (
        normalise({"question": "hi", "answer": "yo", "label": 0}, "query_response", DataSource(path="x")).label is None
    )


def test_an_answer_not_to_give_is_not_taught_and_is_no_fault_of_the_data(tmp_path: Path) -> None:
    rows = [{"messages": [*ASKED, YO], "label": number % 2 == 0} for number in range(8)] + [{"messages": []}]
    table = prepare_chunk(plan_of(write_jsonl(tmp_path / "a.jsonl", rows)), 0, make_tokenizer(CHATML))
    bad = [BadRow(**json.loads(line)) for one in table["bad"].to_pylist() for line in one]
    assert sorted(row.row for row in bad if not row.counts) == [1, 3, 5, 7]
    assert sorted(key for one in table["rows"].to_pylist() for key in one) == [0, 2, 4, 6]
    check(bad, 9, 0.12)
    with pytest.raises(DataError, match="1 of 9 rows are bad"):
        check(bad, 9, 0.1)


def test_the_chosen_answer_is_what_is_trained(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(CHATML)
    plan = plan_of(write_jsonl(tmp_path / "a.jsonl", [SHAPES["trl texts"]]))
    assert "go away" not in tokenizer.decode(prepare_chunk(plan, 0, tokenizer)["input_ids"][0].as_py())
