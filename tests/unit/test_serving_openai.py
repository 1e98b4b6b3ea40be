"""What requests are refused, with which status, field and code; and what a request without wishes gets."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rayswift.serving import wishes
from rayswift.serving.api_errors import ApiError
from rayswift.serving.content import Content
from rayswift.serving.defaults import SamplingDefaults
from rayswift.serving.engine import Sampling
from rayswift.serving.openai import ChatRequest, TextRequest, parse

_USER = {"role": "user", "content": "hi"}
_CHAT: dict[str, Any] = {"model": "m", "messages": [_USER]}
_TEXT: dict[str, Any] = {"model": "m", "prompt": "hi"}

_BAD_CHAT: list[tuple[dict[str, Any], str | None, str]] = [
    ({"model": None}, "model", "missing_required_parameter"),
    ({"model": 3}, "model", "invalid_value"),
    ({"messages": None}, "messages", "missing_required_parameter"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": "hi"}, "messages", "invalid_value"),
    ({"messages": [{"role": "alien", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [_USER, {"role": "user"}]}, "messages[1].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_value"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "invalid_value"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content", "invalid_value"),
    (
        {"messages": [_USER | {"tool_calls": [{"id": "1"}]}]},
        "messages[0].tool_calls[0].function",
        "missing_required_parameter",
    ),
    ({"messages": [_USER | {"refusal": "no"}]}, "messages[0].refusal", "unsupported_parameter"),
    ({"messages": [_USER | {"nmae": []}]}, "messages[0].nmae", "unsupported_parameter"),
    ({"temperature": -1}, "temperature", "invalid_value"),
    ({"temperature": 2.1}, "temperature", "invalid_value"),
    ({"temperature": "0.5"}, "temperature", "invalid_value"),
    ({"temperature": True}, "temperature", "invalid_value"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"top_p": 1.5}, "top_p", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 1.5}, "n", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": "5"}, "max_tokens", "invalid_value"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "invalid_value"),
    ({"stop": ["a"] * 5}, "stop", "invalid_value"),
    ({"stop": [""]}, "stop[0]", "invalid_value"),
    ({"stop": 5}, "stop", "invalid_value"),
    ({"seed": 2**63}, "seed", "invalid_value"),
    ({"stream": "yes"}, "stream", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unsupported_parameter"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"logprobs": 3}, "logprobs", "invalid_value"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
    ({"frequency_penalty": 2.5}, "frequency_penalty", "invalid_value"),
    ({"presence_penalty": False}, "presence_penalty", "invalid_value"),
    ({"top_k": -2}, "top_k", "invalid_value"),
    ({"top_k": 2.5}, "top_k", "invalid_value"),
    ({"min_p": 1.5}, "min_p", "invalid_value"),
    ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls", "unsupported_parameter"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
    ({"temprature": 1}, "temprature", "unknown_parameter"),
    ({"prompt": "hi"}, "prompt", "unknown_parameter"),
]
_BAD_TEXT: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", "missing_required_parameter"),
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": {}}, "prompt", "invalid_value"),
    ({"prompt": [1, -1]}, "prompt", "invalid_value"),
    ({"prompt": [[]]}, "prompt", "invalid_value"),
    ({"prompt": [1, "a"]}, "prompt", "invalid_value"),
    ({"prompt": [True]}, "prompt", "invalid_value"),
    ({"echo": True}, "echo", "unsupported_parameter"),
    ({"suffix": "x"}, "suffix", "unsupported_parameter"),
    ({"best_of": 3}, "best_of", "unsupported_parameter"),
    ({"logprobs": -1}, "logprobs", "invalid_value"),
]


def _refusal(kind: type, body: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(kind, body)
    return caught.value


@pytest.mark.parametrize(("change", "param", "code"), _BAD_CHAT, ids=[json.dumps(c[0])[:50] for c in _BAD_CHAT])
def test_bad_chat_requests(change: dict[str, Any], param: str, code: str) -> None:
    error = _refusal(ChatRequest, json.dumps(_CHAT | change).encode())
    assert (error.status, error.param, error.code) == (400, param, code)
    assert set(error.body()["error"]) == {"message", "type", "param", "code"}
    assert error.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("change", "param", "code"), _BAD_TEXT, ids=[json.dumps(c[0])[:50] for c in _BAD_TEXT])
def test_bad_text_requests(change: dict[str, Any], param: str, code: str) -> None:
    error = _refusal(TextRequest, json.dumps(_TEXT | change).encode())
    assert (error.status, error.param, error.code) == (400, param, code)


@pytest.mark.parametrize(
    "body",
    [b"", b"{bad", b"[]", b'"x"', b"null", b"\xff\xfe", b'{"model": NaN}', b'{"model": "\\ud800"}', b"[" * 100_000],
    ids=["empty", "bad", "array", "string", "null", "not-utf8", "nan", "surrogate", "deep"],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    assert _refusal(ChatRequest, body).code == "invalid_json"


def test_a_misspelled_field_gets_a_suggestion() -> None:
    assert "did you mean temperature?" in str(_refusal(ChatRequest, json.dumps(_CHAT | {"temprature": 1}).encode()))


def test_options_that_ask_for_nothing_are_accepted() -> None:
    harmless = {
        "user": "me", "metadata": {"a": "b"}, "tools": [], "logit_bias": {}, "store": False, "seed": None,
        "stop": None, "max_tokens": None, "parallel_tool_calls": True, "service_tier": "auto",
    }  # fmt: skip
    assert parse(ChatRequest, json.dumps(_CHAT | harmless).encode()) == parse(ChatRequest, json.dumps(_CHAT).encode())


def test_a_message_of_an_earlier_answer_is_accepted_as_the_client_has_it() -> None:
    answer: dict[str, Any] = {"role": "assistant", "content": "hello"}
    extras = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": [], "name": None}
    chat = _chat(messages=[_USER, answer | extras, _USER])
    assert chat == _chat(messages=[_USER, answer, _USER])


def test_content_parts_are_joined_and_prompts_are_lists() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat = parse(ChatRequest, json.dumps(_CHAT | {"messages": [{"role": "user", "content": parts}]}).encode())
    assert chat.messages[0].content == Content("ab")
    for prompt, expected in (("x", ["x"]), (["x", "y"], ["x", "y"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])):
        text = parse(TextRequest, json.dumps({"model": "m", "prompt": prompt, "n": 2}).encode())
        assert text.prompt == expected
        assert text.num_choices == 2 * len(expected)


def _chat(**fields: Any) -> ChatRequest:
    return parse(ChatRequest, json.dumps(_CHAT | fields).encode())


def _sampling(request: ChatRequest | TextRequest, defaults: SamplingDefaults | None = None, **fits: int) -> Sampling:
    return wishes.sampling(request, defaults=defaults or SamplingDefaults(), **fits)


def test_what_a_request_does_not_say_is_as_the_models_folder_wishes() -> None:
    fits = {"num_prompt_tokens": 10, "room": 64, "max_new_tokens": 40}
    defaults = SamplingDefaults(temperature=0.6, top_k=20, repetition_penalty=1.05, max_new_tokens=30)
    found = _sampling(_chat(), defaults, **fits)
    assert (found.temperature, found.top_p, found.top_k, found.repetition_penalty) == (0.6, 1.0, 20, 1.05)
    assert found.max_new_tokens == 30
    asked = _chat(temperature=0, top_k=0, top_p=0.5, min_p=0.1, max_tokens=35, presence_penalty=1, frequency_penalty=-1)
    found = _sampling(asked, defaults, **fits)
    assert (found.temperature, found.top_k, found.top_p, found.min_p, found.max_new_tokens) == (0, 0, 0.5, 0.1, 35)
    assert (found.presence_penalty, found.frequency_penalty, found.repetition_penalty) == (1, -1, 1.05)
    without = _sampling(_chat(), **fits)
    assert without == Sampling(max_new_tokens=40)


def test_sampling_of_a_request_without_wishes_takes_the_room_that_is_left() -> None:
    assert _sampling(_chat(), num_prompt_tokens=10, room=64, max_new_tokens=1000).max_new_tokens == 54
    assert _sampling(_chat(), num_prompt_tokens=10, room=64, max_new_tokens=20).max_new_tokens == 20
    text = parse(TextRequest, json.dumps(_TEXT).encode())
    assert _sampling(text, num_prompt_tokens=10, room=64, max_new_tokens=20).max_new_tokens == 16


@pytest.mark.parametrize(
    ("fields", "num_prompt_tokens", "code"),
    [
        ({}, 64, "context_length_exceeded"),
        ({"max_tokens": 60}, 10, "context_length_exceeded"),
        ({"max_completion_tokens": 60}, 10, "context_length_exceeded"),
        ({"max_tokens": 2000}, 10, "invalid_value"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], num_prompt_tokens: int, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        _sampling(_chat(**fields), num_prompt_tokens=num_prompt_tokens, room=64, max_new_tokens=1000)
    assert (caught.value.status, caught.value.code) == (400, code)


def test_seeds_of_several_answers_are_counted_up() -> None:
    sampling = _sampling(_chat(seed=5, n=3), num_prompt_tokens=1, room=64, max_new_tokens=9)
    assert [wishes.for_choice(sampling, i).seed for i in range(3)] == [5, 6, 7]
