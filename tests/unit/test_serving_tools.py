"""Tools: what clients may name, calls read out of an answer however it is cut, and what an answer is held to."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from rayswift.models.loading import load_tokenizer
from rayswift.serving.admission import Admission
from rayswift.serving.calls import CallReader
from rayswift.serving.engine import FakeEngine
from rayswift.serving.http import build_asgi
from rayswift.serving.prompts import PromptBuilder
from rayswift.serving.served import ServedModel
from rayswift.serving.spec import ServeSpec
from rayswift.serving.tools import Calling, Tool

_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]},
    },
}
_NAMED = {"type": "function", "function": {"name": "get_weather"}}
_TOOL = Tool.model_validate(_WEATHER)
_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
_TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t.function.name }} <tool_call>{% endfor %}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call {{ c.function.name }} {{ c.function.arguments.city }}>{% endfor %}"
    "{% endfor %}[assistant]"
)


def _read(text: str, cuts: list[int], demanded: str | None = None) -> tuple[str, list[tuple[str, Any]]]:
    reader, said, at = CallReader(Calling((_TOOL,), demanded)), "", 0
    for cut in [*sorted(cuts), len(text)]:
        said += reader.feed(text[at:cut], is_last=False)[0]
        at = max(at, cut)
    said += reader.feed("", is_last=True)[0]
    return said, [(call.name, json.loads(call.arguments)) for call in reader.calls]


@given(st.lists(st.integers(0, 200), max_size=8))
def test_calls_are_read_however_the_text_is_cut(cuts: list[int]) -> None:
    text = f"Let me <see>.\n{_CALL}\n{_CALL}"
    assert _read(text, [min(cut, len(text)) for cut in cuts]) == (
        "Let me <see>.\n", [("get_weather", {"city": "Rome"})] * 2,
    )  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "no call <tool_", "<tool_call>{}</tool_call>", "<tool_call>not JSON</tool_call>", "<tool_call>{", "",
        _CALL.replace("Rome", "Bonn"), _CALL.replace("get_weather", "other"), _CALL.replace('"city"', '"town"'),
        '<tool_call>{"name": [1], "arguments": 5}</tool_call>', "<tool_call>" + "[" * 5000 + "</tool_call>",
        _CALL.replace("Rome", "Bonn").removesuffix("</tool_call>"), _CALL[:-20],
    ],
)  # fmt: skip
def test_what_is_no_call_of_a_tool_is_said(text: str) -> None:
    assert _read(text, list(range(0, len(text), 7))) == (text, [])


@pytest.mark.parametrize("demanded", [None, "*", "get_weather"])
def test_a_call_is_whole_without_its_last_mark_once_the_answer_ends(demanded: str | None) -> None:
    calling, text = Calling((_TOOL,), demanded, is_written=True), _CALL.removesuffix("</tool_call>")
    reader = CallReader(calling)
    assert reader.feed(text, is_last=False) == ("", [])
    said, (call,) = reader.feed("", is_last=True)
    assert (said, call.name, json.loads(call.arguments)) == ("", "get_weather", {"city": "Rome"})


def test_arguments_may_be_written_as_a_text() -> None:
    text = '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}</tool_call>'
    assert _read(text, []) == ("", [("get_weather", {"city": "Oslo"})])


def test_a_demanded_call_is_the_whole_answer() -> None:
    assert _read('{"city": "Oslo"}', [3], "get_weather") == ("", [("get_weather", {"city": "Oslo"})])
    many = json.dumps([{"name": "get_weather", "arguments": {"city": "Rome"}}] * 2)
    assert _read(many, [9], "*")[1] == [("get_weather", {"city": "Rome"})] * 2
    assert _read('{"city": "Os', [], "get_weather") == ('{"city": "Os', [])  # cut at max_tokens


_REFERRING: list[tuple[dict[str, Any], Any, Any]] = [
    ({"$defs": {"X": {"type": "string"}}, "properties": {"a": {"$ref": "#/$defs/X"}}}, {"a": "x"}, {"a": 1}),
    ({"$defs": {"X": {"type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/X"}}}, {"a": 1}, {"a": "x"}),
    ({"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"X": {"enum": [5]}},
      "properties": {"a": {"$ref": "#/definitions/X"}}}, {"a": 5}, {"a": 6}),
    ({"type": "object", "properties": {"a": {"$ref": "#"}}, "additionalProperties": False}, {"a": {}}, {"a": {"b": 1}}),
    ({"$id": "https://example.org/s", "$defs": {"X": {"$anchor": "here", "const": 7}},
      "properties": {"a": {"$ref": "#here"}, "b": {"$ref": "https://example.org/s#/$defs/X"}}},
     {"a": 7, "b": 7}, {"b": 8}),
    ({"$defs": {"a b/c%": {"const": 7}}, "properties": {"a": {"$ref": "#/$defs/a%20b~1c%25"}}}, {"a": 7}, {"a": 8}),
    ({"properties": {"$ref": {"type": "string"}, "a": {"const": {"$ref": "#/x"}}}},
     {"$ref": "#", "a": {"$ref": "#/x"}}, {"a": {"$ref": "#/$defs/tool_6/x"}}),
]  # fmt: skip


def test_references_of_any_of_the_tools_lead_into_their_own_schemas() -> None:
    functions = [{"name": f"f{i}", "parameters": schema} for i, (schema, _, _) in enumerate(_REFERRING)]
    tools = tuple(Tool.model_validate({"type": "function", "function": function}) for function in functions)
    schema = json.loads(str(Calling(tools, "*").schema_text))
    for i, (_, valid, invalid) in enumerate(_REFERRING):
        assert jsonschema_rs.is_valid(schema, [{"name": f"f{i}", "arguments": valid}]), i
        assert not jsonschema_rs.is_valid(schema, [{"name": f"f{i}", "arguments": invalid}]), i


def test_a_call_that_takes_too_long_to_check_is_one_only_where_a_grammar_has_held_it() -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string", "pattern": "(?:a?b?){1000}"}}}
    tool = Tool.model_validate({"type": "function", "function": {"name": "get_weather", "parameters": parameters}})
    text = _CALL.replace("Rome", "ab" * 5000)
    for demanded, num_calls in ((None, 0), ("*", 1), ("get_weather", 1)):
        reader = CallReader(Calling((tool,), demanded, is_written=True))
        said, calls = reader.feed(text, is_last=True)
        assert (said, len(calls)) == ("" if num_calls else text, num_calls)
        assert not reader.feed(_CALL.replace('"Rome"', "5"), is_last=True)[1]  # known not to be one


class _Server:
    def __init__(self, folder: Path, template: str, pieces: tuple[str, ...], **engine: Any) -> None:
        tokenizer = load_tokenizer(str(folder))
        tokenizer.chat_template = template
        self.engine = FakeEngine(pieces, max_model_len=2048, **engine)
        served = ServedModel(self.engine, PromptBuilder(tokenizer), Admission(4, 4))
        self.tokenizer, self._app = tokenizer, build_asgi(ServeSpec(models={"m": "unused"}), {"m": served})

    def chat(self, **fields: Any) -> httpx.Response:
        async def once() -> httpx.Response:
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=20) as client:
                body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": [_WEATHER]} | fields
                return await client.post("/v1/chat/completions", json=body)

        return asyncio.run(once())

    def prompt(self) -> str:
        return str(self.tokenizer.decode(self.engine.seen[-1].prompt.ids))


def test_a_call_is_answered_as_the_api_has_it(tiny_model_dir: Path) -> None:
    server = _Server(tiny_model_dir, _TEMPLATE, ("Let me see. ", _CALL[:20], _CALL[20:]))
    choice = server.chat().json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see. "
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "get_weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
    assert "get_weather" in server.prompt()
    earlier = [
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "12 degrees"},
    ]  # fmt: skip
    assert server.chat(messages=earlier).status_code == 200
    assert "<call get_weather Rome>" in server.prompt()
    assert "12 degrees" in server.prompt()


def test_a_streamed_call_comes_as_deltas(tiny_model_dir: Path) -> None:
    server = _Server(tiny_model_dir, _TEMPLATE, ("Hm ", _CALL[:20], _CALL[20:]))
    lines = [line[6:] for line in server.chat(stream=True).text.split("\n") if line.startswith("data: ")]
    choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == "Hm "
    (calls,) = [choice["delta"]["tool_calls"] for choice in choices if "tool_calls" in choice["delta"]]
    assert (calls[0]["index"], calls[0]["function"]["name"]) == (0, "get_weather")
    assert choices[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("choice", [_NAMED, "required"], ids=["named", "required"])
def test_a_demanded_call_holds_the_engine_to_the_form_the_model_was_trained_to(
    tiny_model_dir: Path, choice: Any
) -> None:
    server = _Server(tiny_model_dir, _TEMPLATE, (_CALL[:20], _CALL[20:]), can_constrain=True)
    answer = server.chat(tool_choice=choice).json()["choices"][0]
    assert answer["message"]["content"] is None
    assert answer["message"]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    assert answer["finish_reason"] == ("stop" if choice is _NAMED else "tool_calls")  # as OpenAI's API has it
    held = server.engine.seen[-1].sampling
    assert held.json_schema is None
    assert held.grammar is not None
    start, call, _, one, arguments = held.grammar.split("\n")
    assert start == ("start: call " if choice is _NAMED else "start: call (NEWLINE? call){0,63}")
    assert call == 'call: "<tool_call>" NEWLINE? (call_0) NEWLINE? "</tool_call>"'
    assert one == r'call_0: "{\"name\": \"get_weather\", \"arguments\": " arguments_0 "}"'
    schema = json.loads(arguments.removeprefix("arguments_0: %json "))
    del schema["x-guidance"]
    assert schema == _WEATHER["function"]["parameters"]  # type: ignore[index]


def test_a_demanded_call_of_a_model_with_another_form_is_held_to_the_schema(tiny_model_dir: Path) -> None:
    other = _TEMPLATE.replace("<tool_call>", "<tool_call><function=")
    server = _Server(tiny_model_dir, other, ('{"city": ', '"Oslo"}'), can_constrain=True)
    choice = server.chat(tool_choice=_NAMED).json()["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    assert choice["finish_reason"] == "stop"
    held = server.engine.seen[-1].sampling
    assert (json.loads(str(held.json_schema)), held.grammar) == (_WEATHER["function"]["parameters"], None)  # type: ignore[index]


def test_an_engine_that_holds_to_nothing_is_demanded_no_call(tiny_model_dir: Path) -> None:
    plain = _Server(tiny_model_dir, _TEMPLATE, ("x",))
    for choice in (_NAMED, "required"):
        assert plain.chat(tool_choice=choice).json()["error"]["param"] == "tool_choice"
    assert plain.chat(tool_choice="none").status_code == 200
    assert "get_weather" not in plain.prompt()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [_WEATHER, _WEATHER]}, None),
        ({"tools": [_WEATHER] * 65}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "nope"}}}]},
         "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"$ref": "http://x/y"}}}]},
         "tools[0].function.parameters"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, None),
        ({"tools": [], "tool_choice": "required"}, None),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"response_format": {"type": "json_object"}}, None),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "a"}]}, "messages[0]"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": "[1]"}}]}]}, "messages[0]"),
    ],
)  # fmt: skip
def test_tools_beyond_their_bounds_are_refused(tiny_model_dir: Path, fields: dict[str, Any], param: str | None) -> None:
    reply = _Server(tiny_model_dir, _TEMPLATE, ("x",), can_constrain=True).chat(**fields)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


def test_a_template_that_cannot_call_is_told(tiny_model_dir: Path) -> None:
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert "knows no tools" in _Server(tiny_model_dir, plain, ("x",)).chat().json()["error"]["message"]
    # no marks, and Qwen3-Coder's and GLM-4.5's, between which is no JSON
    for form in ("", "<tool_call>\n<function=f>", "<tool_call>f\n<arg_key>"):
        other = plain + "{{ tools }}" + form
        server = _Server(tiny_model_dir, other, ('{"city": "Oslo"}',), can_constrain=True)
        assert server.chat().json()["error"]["param"] == "tool_choice"
    assert server.chat(tool_choice=_NAMED).status_code == 200


def test_marks_that_engines_leave_out_of_a_text_are_told(tiny_model_dir: Path) -> None:
    for special in (False, True):
        tokenizer = load_tokenizer(str(tiny_model_dir))
        tokenizer.chat_template = _TEMPLATE
        tokenizer.add_tokens([AddedToken("<tool_call>", special=special)], special_tokens=special)
        assert ("tool_choice" in PromptBuilder(tokenizer).chat_takes) == (not special)
