"""Anthropic's content blocks are the turns that OpenAI's rows spell out; what would change their order is refused."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from rayswift.config.job import DataSource
from rayswift.data.detect import normalise
from rayswift.data.formats import RowError
from rayswift.data.types import Sample

SOURCE = DataSource(path="x")
QUESTION = {"role": "user", "content": "How warm?"}
CALL = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}}


def sample(*messages: Any, **row: Any) -> Sample:
    return normalise({"messages": list(messages), **row}, "messages", SOURCE)


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def said(*parts: Any, role: str = "assistant", **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": list(parts), **keys}


def answered(words: Any, *more: Any) -> dict[str, Any]:
    return said({"type": "tool_result", "tool_use_id": "t1", "content": words}, *more, role="user")


def test_blocks_are_the_turns_that_openai_spells_out() -> None:
    thought = {"type": "thinking", "thinking": "I must look.", "signature": "x"}
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    blocks = sample(
        QUESTION, said(thought, text("Wait."), CALL), answered([text("12"), text(" degrees")]), said(text("It is 12.")),
        system=[text("Be brief.")], tools=[{"name": "weather", "description": "d", "input_schema": schema}],
    )  # fmt: skip
    call = {"type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": "Oslo"})}}
    spelled = sample(
        {"role": "system", "content": "Be brief."}, QUESTION,
        {"role": "assistant", "content": "Wait.", "reasoning_content": "I must look.", "tool_calls": [call]},
        {"role": "tool", "content": "12 degrees"}, {"role": "assistant", "content": "It is 12."},
        tools=[{"type": "function", "function": {"name": "weather", "description": "d", "parameters": schema}}],
    )  # fmt: skip
    assert blocks == spelled


def test_what_the_user_says_behind_an_answer_of_a_tool_is_a_turn() -> None:
    found = sample(QUESTION, said(CALL), answered("12", text("And Rome?")), said(text("I do not know.")))
    assert [message.role for message in found.messages] == ["user", "tool_call", "tool", "user", "assistant"]


def test_several_calls_and_the_loss_of_the_turn() -> None:
    found = sample(QUESTION, said(CALL, CALL, loss=False), answered("1"), said(text("12")))
    assert [message.loss for message in found.messages] == [None, 0, 0, None, None]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([QUESTION, said(CALL, text("Wait."))], "in another order"),
        ([QUESTION, said(CALL, {"type": "image"})], "turn 2 has a part of type 'image'"),
        ([said(CALL, role="user")], "turn 1 is user and has a part of type 'tool_use'"),
        ([QUESTION, said({"type": "thinking"}, text("12"))], "turn 2 has a thought that is not text"),
        ([QUESTION, said({"type": "tool_use", "input": {}})], "turn 2 has a tool call without a name"),
        (
            [QUESTION, said(CALL), answered([{"type": "image"}]), said(text("12"))],
            "1 places for images (<image>) and 0 images",
        ),
    ],
)
def test_what_has_no_place_is_refused(messages: list[Any], reason: str) -> None:
    with pytest.raises(RowError, match=re.escape(reason)):
        sample(*messages)
