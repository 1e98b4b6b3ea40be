"""Calls read out of answers with marks in their arguments and thoughts, however the text is cut, in linear time."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from rayswift.models.loading import load_tokenizer
from rayswift.serving.admission import Admission
from rayswift.serving.calls import THOUGHTS, CallReader, JsonEnd, thought_end
from rayswift.serving.engine import FakeEngine
from rayswift.serving.http import build_asgi
from rayswift.serving.prompts import PromptBuilder
from rayswift.serving.served import ServedModel
from rayswift.serving.spec import ServeSpec
from rayswift.serving.tools import MAX_CALLS, Calling, Tool

_WRITE = {
    "type": "function",
    "function": {
        "name": "write",
        "parameters": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
    },
}
_TOOL = Tool.model_validate(_WRITE)
_XML = '<tool_call>\n{"name": "write", "arguments": {"text": "x"}}\n</tool_call> and </tool_call> <think> "}'


def _call(text: str = "x") -> str:
    return f"<tool_call>\n{json.dumps({'name': 'write', 'arguments': {'text': text}})}\n</tool_call>"


def _read(
    text: str, cuts: Sequence[int] = (), demanded: str | None = None, thought: str | None = None
) -> tuple[str, list[str]]:
    """What is said, and the texts that are written."""
    reader, said, calls, at = CallReader(Calling((_TOOL,), demanded, is_written=True), thought), "", [], 0
    for cut in [*sorted(min(cut, len(text)) for cut in cuts), len(text)]:
        more, made = reader.feed(text[at:cut], is_last=False)
        said, calls, at = said + more, calls + made, cut
    more, made = reader.feed("", is_last=True)
    assert calls + made == reader.calls
    return said + more, [json.loads(call.arguments)["text"] for call in reader.calls]


_CUTS = st.lists(st.integers(0, 400), max_size=12)


@pytest.mark.parametrize("demanded", [None, "*", "write"])
@given(cuts=_CUTS)
def test_marks_in_arguments_are_part_of_them(demanded: str | None, cuts: list[int]) -> None:
    assert _read(_call(_XML), cuts, demanded) == ("", [_XML])
    assert _read(_call("</tool_call>") + "\n" + _call("<tool_call>"), cuts, demanded)[1] == [
        "</tool_call>",
        "<tool_call>",
    ]


@pytest.mark.parametrize("name", THOUGHTS)
@given(cuts=_CUTS)
def test_nothing_is_called_in_a_thought(name: str, cuts: list[int]) -> None:
    thought = f"<{name}>I could {_call('a')} or\n{_call('b')}.</{name}>"
    assert _read(f"{thought}\n{_call('c')}", cuts) == (thought + "\n", ["c"])
    assert _read(f" \n{thought}{thought}{_call('c')}{thought}{_call('d')}", cuts) == (" \n" + thought * 3, ["c", "d"])
    prose = f"I wrap it in <{name}>.\n"  # a word, which nothing closes
    assert _read(prose + _call("c"), cuts) == (prose, ["c"])
    assert _read(f"{_call('b')}{prose}{_call('c')}", cuts) == (prose, ["b", "c"])
    assert _read(f"{thought}{prose}{_call('c')}", cuts) == (thought + prose, ["c"])
    begun = thought.removeprefix(f"<{name}>")
    assert _read(begun + _call("c"), cuts, thought=f"</{name}>") == (begun, ["c"])
    for unended in (thought.removesuffix(f"</{name}>"), thought[:-1], thought.replace(f"</{name}>", "</other>")):
        assert _read(unended, cuts) == (unended, [])
        assert _read(unended, cuts, thought=f"</{name}>") == (unended, [])


@pytest.mark.parametrize("demanded", ["*", "write"])
def test_an_answer_that_has_to_call_has_no_thoughts(demanded: str) -> None:
    """A grammar has held it to calls from its begin, also where the prompt has begun a thought."""
    assert _read(_call("<think>") + _call(), [30], demanded, thought="</think>") == ("", ["<think>", "x"])


@pytest.mark.parametrize("rest", ["", "\n", "\n</tool_", "<", "</tool_call"])
def test_a_call_is_whole_whose_last_mark_is_cut(rest: str) -> None:
    assert _read(_call(_XML).removesuffix("\n</tool_call>") + rest, [40]) == ("", [_XML])


@pytest.mark.parametrize(
    "text",
    [
        _call(_XML).replace('"text"', '"other"'),  # of no tool's schema, whatever is called in it
        _call(_XML).replace('"write"', '"other"', 1), _call(_XML).replace("}\n</tool_call>", ",}\n</tool_call>"),
        _call(_XML)[:-40], _call().replace("\n</tool_call>", "} </tool_call>"),
        '<tool_call>{"name": "write", "arguments": {"text": "' + _call() + '"}}</tool_call>',  # quotes not escaped
        "<tool_call>" + _call(), "<tool_call>{}" + _call(), "<tool_call>\nx" + _call(), '<tool_call>{"a' + _call(),
        "<tool_call>\u00a0{}</tool_call>", '<tool_call>{"a": "\\', "<tool_call>{]}]</tool_call>", "<tool_call",
    ],
)  # fmt: skip
def test_what_is_no_call_is_said_up_to_its_end_and_nothing_in_it_is_called(text: str) -> None:
    for cuts in ([], list(range(len(text)))):
        assert _read(text, cuts) == (text, [])
        assert _read(f"{text}</tool_call>\n{_call('behind')}", cuts)[1] == ["behind"]


def test_no_more_calls_are_made_than_a_client_may_send_back() -> None:
    said, calls = _read(_call() * (MAX_CALLS + 2), list(range(0, 400, 7)))
    assert (said, len(calls)) == (_call() * 2, MAX_CALLS)


def test_what_was_no_call_is_told_before_the_answer_ends() -> None:
    reader = CallReader(Calling((_TOOL,)))
    assert reader.feed("Hm <tool_call>{x", is_last=False) == ("Hm ", [])
    assert reader.feed(' "<', is_last=False) == ("", [])  # that mark may stand in a text
    assert reader.feed('" <', is_last=False) == ('<tool_call>{x "<" ', [])
    assert reader.feed("/tool_call> so", is_last=False) == ("</tool_call> so", [])


_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
    | st.sampled_from([_XML, "\\", '"', "{", "]", "</tool_call>"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.text(max_size=4), _VALUES, max_size=4), st.booleans(), st.sampled_from([None, 0, 2]), _CUTS)
def test_json_ends_where_it_ends(value: dict[str, Any], is_ascii: bool, indent: int | None, cuts: list[int]) -> None:
    written = "\n " + json.dumps(value, ensure_ascii=is_ascii, indent=indent)
    text, scanner, at = written + '}"{ more', JsonEnd(), 0
    for cut in [*sorted(min(cut, len(written) - 1) for cut in cuts), len(written) - 1]:
        assert scanner.end_in(text[at:cut], 0) is None
        at = cut
    assert scanner.end_in(text, at) == len(written)


_PARTS = st.sampled_from([
    "<tool_call>", "</tool_call>", "<think>", "</think>", _call(), _call(_XML), '{"name": "write", "arguments": ',
    '{"text": "', '"}}', '"', "\\", "\n", "text ", "<", "</t", "{", "}", "[",
])  # fmt: skip


@settings(max_examples=400)
@given(st.lists(_PARTS, max_size=12).map("".join), _CUTS, st.sampled_from([None, "</think>"]))
def test_however_an_answer_is_cut_the_same_is_read_and_nothing_is_lost(
    text: str, cuts: list[int], thought: str | None
) -> None:
    said, calls = whole = _read(text, [], thought=thought)
    assert _read(text, cuts, thought=thought) == whole
    assert _read(text, list(range(len(text))), thought=thought) == whole
    assert said.replace("\n", "").replace(" ", "") == _without_calls(text, thought).replace("\n", "").replace(" ", "")
    if not calls:
        assert said == text


def _without_calls(text: str, thought: str | None) -> str:
    """By definition, of the text as a whole: what is said of it."""
    said, decoder, in_prose = "", json.JSONDecoder(), False
    while text:
        if thought is not None:
            before, end, text = text.partition(thought)
            said, thought, in_prose = said + before + end, None, False
            continue
        start = min((at for mark in ("<tool_call>", "<think>") if (at := text.find(mark)) >= 0), default=len(text))
        in_prose = in_prose or bool(text[:start].strip())
        said, text = said + text[:start], text[start:]
        if text.startswith("<think>") and in_prose:
            said, text = said + "<think>", text.removeprefix("<think>")
            continue
        if text.startswith("<think>"):
            said, text, thought = said + "<think>", text.removeprefix("<think>"), "</think>"
            continue
        body = text.removeprefix("<tool_call>")
        try:
            assert body.lstrip(" \t\n\r").startswith("{")
            found, end_at = decoder.raw_decode(body.lstrip(" \t\n\r"))
            rest = body.lstrip(" \t\n\r")[end_at:].lstrip(" \t\n\r")
            assert rest.startswith("</tool_call>") or "</tool_call>".startswith(rest)
            json_and_mark = len(body) - len(rest) + min(len(rest), len("</tool_call>"))
            if found.get("name") != "write" or not isinstance(found["arguments"]["text"], str):
                said += "<tool_call>" + body[:json_and_mark]
                in_prose = True
            else:
                in_prose = False
            text = body[json_and_mark:]
        except (AssertionError, ValueError, KeyError, TypeError):
            before, end, text = text.partition("</tool_call>")
            said, in_prose = said + before + end, True
    return said


_UNITS = (
    "<tool_call>", "<tool_call>{", '<tool_call>{"', '</tool_call><tool_call>{"', '</tool_call><tool_call>{":"',
    '<tool_call>{"":"</tool_call>', "<tool_call></tool_call>", "<tool_call>{}</tool_call>", "<", "</tool_call>",
    "<think>", "<think></think>", "<tool_call>{} ", " ", '"', "\\", '<tool_call>{"\n', _call("</tool_call>"),
)  # fmt: skip


@pytest.mark.parametrize("begin", ["", "<tool_call>", '<tool_call>{"', "<tool_call>{}", "<think>"])
def test_an_answer_of_any_length_is_read_in_time_that_is_proportional_to_it(begin: str) -> None:
    for unit in _UNITS:
        text = begin + unit * (60_000 // len(unit))
        for size in (3, len(text)):
            began = time.monotonic()
            _read(text, range(0, len(text), size))
            assert time.monotonic() - began < 3, unit  # it takes a tenth of a second


_TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t.function.name }} <tool_call>{% endfor %}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
)


def test_a_thought_is_begun_by_a_prompt_that_ends_so() -> None:
    assert thought_end("[assistant]<think>\n") == thought_end("<think>") == "</think>"
    assert thought_end("x" * 1000 + "<reasoning> \n\n") == "</reasoning>"
    for prompt in ("", "<think>\n\n</think>\n\n", "<think>\nOh", "<thinks>", "think>", "<tool_call>\n"):
        assert thought_end(prompt) is None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", ["", "<think>\n", "<think>\n\n</think>\n"])
def test_a_thought_that_the_template_has_begun_calls_nothing(tiny_model_dir: Path, begun: str, stream: bool) -> None:
    says = (f"perhaps {_call('a')} ", "no</thi", f"nk>Now: {_call('b')}")
    said, calls = _chat(_prompts(tiny_model_dir, _TEMPLATE + begun), says, stream=stream)
    if begun == "<think>\n":
        assert (said, calls) == (f"perhaps {_call('a')} no</think>Now: ", ["b"])
    else:
        assert (said, calls) == ("perhaps no</think>Now: ", ["a", "b"])


def test_an_end_of_a_thought_that_engines_leave_out_is_not_waited_for(tiny_model_dir: Path) -> None:
    for special in (False, True):
        prompts = _prompts(tiny_model_dir, _TEMPLATE + "<think>", AddedToken("</think>", special=special))
        assert (prompts.conversation([{"role": "user", "content": "x"}]).thought_end is None) == special


def _prompts(folder: Path, template: str, *tokens: AddedToken) -> PromptBuilder:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = template
    for token in tokens:
        tokenizer.add_tokens([token], special_tokens=token.special)
    return PromptBuilder(tokenizer)


def _chat(prompts: PromptBuilder, says: tuple[str, ...], *, stream: bool) -> tuple[str, list[str]]:
    served = ServedModel(FakeEngine(says, max_model_len=2048), prompts, Admission(4, 4))
    app = build_asgi(ServeSpec(models={"m": "unused"}), {"m": served})

    async def once() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": [_WRITE], "stream": stream}
            return await client.post("/v1/chat/completions", json=body)

    reply = asyncio.run(once())
    if not stream:
        message = reply.json()["choices"][0]["message"]
        return message["content"], [_text_of(call) for call in message["tool_calls"]]
    lines = [line[6:] for line in reply.text.split("\n") if line.startswith("data: {")]
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
    calls = [call for delta in deltas for call in delta.get("tool_calls") or []]
    return "".join(delta.get("content") or "" for delta in deltas), [_text_of(call) for call in calls]


def _text_of(call: dict[str, Any]) -> str:
    return str(json.loads(call["function"]["arguments"])["text"])
