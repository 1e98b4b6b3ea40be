"""Tools of our endpoint beside those of vLLM's own server with the parser `hermes`, asked by the official client.

The model has learnt to call. Where the two differ on purpose, a test says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema_rs
import openai
import pytest

from tests import vllm_cases
from tests.tool_model import TOOLS, WEATHER, answered, asked, make_caller, written
from tests.vllm_cases import Pair, both

pytestmark = vllm_cases.MARKS
_NAMED = {"type": "function", "function": {"name": "get_time"}}
_ROME = [("get_weather", WEATHER)]
_OSLO = [("get_time", {"city": "Oslo"})]
_BOTH = [("get_time", {"city": "Rome"}), ("get_time", {"city": "Oslo"})]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path) -> Path:
    return make_caller(tmp_path_factory.mktemp("caller") / "m", tiny_text)


@pytest.fixture(scope="module")
def pair(
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    free_port: Callable[[], int],
    serving_ray: Callable[[], AbstractContextManager[int]],
) -> Iterator[Pair]:
    # Ours tells the model of no tools where it may call none: it would write a call all the same, as a text.
    options = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--exclude-tools-when-tool-choice-none")
    log = tmp_path_factory.mktemp("vllm-serve") / "log"
    with vllm_cases.pair_over(folder, log, free_port(), serving_ray, 1024, options) as made:
        yield made


@dataclass
class _Said:
    """An answer, whole or put together from a stream."""

    content: str = ""
    calls: list[list[str]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    reason: str | None = None
    usage: tuple[int, int] | None = None

    @property
    def plain(self) -> tuple[Any, ...]:
        """What both have to agree in. Ids are drawn; no text is null in OpenAI's API, and may be empty in vLLM's."""
        return self.content, [(name, json.loads(arguments)) for name, arguments in self.calls], self.reason, self.usage


def _ask(client: openai.OpenAI, chat: list[Any], **fields: Any) -> _Said:
    reply = client.chat.completions.create(model="m", messages=chat, temperature=0, max_tokens=100, **fields)
    (choice,), said = reply.choices, _Said()
    said.content, said.reason = choice.message.content or "", choice.finish_reason
    for call in choice.message.tool_calls or []:
        assert call.type == "function"
        said.calls.append([call.function.name, call.function.arguments])
        said.ids.append(call.id)
    assert reply.usage is not None
    said.usage = (reply.usage.prompt_tokens, reply.usage.completion_tokens)
    return said


def _stream(client: openai.OpenAI, chat: list[Any], **fields: Any) -> _Said:
    chunks = client.chat.completions.create(
        model="m", messages=chat, temperature=0, max_tokens=100, stream=True, stream_options={"include_usage": True},
        **fields,
    )  # fmt: skip
    said = _Said()
    for chunk in chunks:
        if chunk.usage is not None:
            said.usage = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
        for choice in chunk.choices:
            said.content += choice.delta.content or ""
            said.reason = choice.finish_reason or said.reason
            for call in choice.delta.tool_calls or []:
                if call.index == len(said.calls):  # its first part has its id and its name
                    assert call.id
                    assert call.type == "function"
                    said.calls.append([str(call.function and call.function.name), ""])
                    said.ids.append(call.id)
                said.calls[call.index][1] += (call.function and call.function.arguments) or ""
    return said


@pytest.mark.parametrize(
    ("chat", "fields", "content", "calls", "reason"),
    [
        (asked("weather in Rome?"), {}, "", _ROME, "tool_calls"),
        (asked("weather in Rome?"), {"tool_choice": "auto"}, "", _ROME, "tool_calls"),
        (asked("time in Rome and Oslo?"), {}, "Both at once.\n", _BOTH, "tool_calls"),
        (asked("hello"), {"tool_choice": "auto"}, "Hello to you.", [], "stop"),
        (asked("weather in Rome?"), {"tool_choice": "required"}, "", _ROME, "tool_calls"),
        (asked("time in Oslo?"), {"tool_choice": "required"}, "", _OSLO, "tool_calls"),
        # `stop` is what OpenAI's API says of a call that was demanded by its name
        (asked("time in Oslo?"), {"tool_choice": _NAMED}, "", _OSLO, "stop"),
        (asked("weather in Rome?"), {"tool_choice": "none"}, "I cannot know.", [], "stop"),
    ],
)
def test_calls_are_the_same_whole_and_streamed(
    pair: Pair, chat: list[Any], fields: dict[str, Any], content: str, calls: list[Any], reason: str
) -> None:
    for ask in (_ask, _stream):
        said = both(pair, lambda client, ask=ask: ask(client, chat, tools=TOOLS, **fields).plain)
        assert said[:3] == (content, calls, reason)


def test_what_a_tool_has_returned_is_answered_alike(pair: Pair) -> None:
    """The second turn as a client writes it, from the first one's reply."""

    def ask(client: openai.OpenAI) -> Any:
        first = _ask(client, asked("weather in Rome?"), tools=TOOLS)
        ((name, arguments),), (number,) = first.calls, first.ids
        second = answered("weather in Rome?", number, name, arguments, "12 degrees")
        whole, streamed = (one(client, second, tools=TOOLS).plain for one in (_ask, _stream))
        assert whole == streamed
        return whole

    assert both(pair, ask)[:3] == ("It is 12 there.", [], "stop")


def test_an_end_where_the_mark_should_be_and_a_cut_call_are_read_alike(pair: Pair) -> None:
    def stopped(client: openai.OpenAI) -> Any:
        found = [one(client, asked("weather in Rome?"), tools=TOOLS, stop=["</tool_call>"]).plain[:3]
                 for one in (_ask, _stream)]  # fmt: skip
        assert found[0] == found[1]
        return found[0]

    assert both(pair, stopped) == ("", _ROME, "tool_calls")

    def cut(client: openai.OpenAI) -> Any:
        reply = client.chat.completions.create(model="m", messages=asked("weather in Rome?"), temperature=0,
                                               max_tokens=8, tools=TOOLS)  # fmt: skip
        return (
            reply.choices[0].message.content,
            reply.choices[0].message.tool_calls or [],
            reply.choices[0].finish_reason,
        )

    content, calls, reason = both(pair, cut)
    assert written(*_ROME[0]).startswith(content)
    assert (calls, reason) == ([], "length")


def test_arguments_keep_to_the_schema_with_us_whether_or_not_it_is_strict(pair: Pair) -> None:
    """OpenAI promises it of strict tools alone, and vLLM holds to it for those alone; ours are held to it always."""
    strict = [tool | {"function": tool["function"] | {"strict": True}} for tool in TOOLS]
    for client, tools in ((pair[0], TOOLS), (pair[0], strict), (pair[1], strict)):
        for ask in (_ask, _stream):
            said = ask(client, asked("hello"), tools=tools, tool_choice="required")  # nothing that it has learnt
            assert said.calls
            for name, arguments in said.calls:
                (tool,) = [one["function"] for one in tools if one["function"]["name"] == name]
                jsonschema_rs.validate(tool["parameters"], json.loads(arguments))
