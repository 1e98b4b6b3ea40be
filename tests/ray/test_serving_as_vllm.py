"""Our endpoint over vLLM beside vLLM's own server over the same folder: the same answers to the official client.

Where the two refuse, the status is compared: the words of ours are OpenAI's, those of vLLM its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import jiter
import jsonschema_rs
import openai
import pytest

from rayswift.models.init import init_model
from rayswift.serving.app import serve_in_background
from rayswift.serving.spec import ServeSpec
from tests import vllm_cases
from tests.vllm_cases import Pair, both

pytestmark = vllm_cases.MARKS
_MAX_LEN = 256
_CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "the quick brown"}], "max_tokens": 12}
_TEXT: dict[str, Any] = {"prompt": "the quick brown fox", "max_tokens": 12}
# As ours: with free whitespace a model without sense writes that alone, until its tokens end.
_COMPACT = '{"backend": "guidance", "disable_any_whitespace": true}'
_SCHEMA = {
    "type": "object",
    "properties": {
        "digit": {"type": "integer", "minimum": 0, "maximum": 9},
        "letters": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3},
        "inner": {"$ref": "#/$defs/inner"},
    },
    "required": ["digit", "letters", "inner"],
    "additionalProperties": False,
    "$defs": {"inner": {"type": "object", "properties": {"is_it": {"type": "boolean"}}, "required": ["is_it"],
                        "additionalProperties": False}},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path) -> Path:
    made = tmp_path_factory.mktemp("as-vllm") / "m"
    init_model(
        str(made), arch="qwen3", layers=2, hidden_size=128, heads=4, kv_heads=2, vocab_size=512,
        train_tokenizer_files=[str(tiny_text)], seed=0,
    )  # fmt: skip
    config = made / "generation_config.json"
    wishes = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2, "max_new_tokens": 12}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"do_sample": True} | wishes))
    return made


@pytest.fixture(scope="module")
def theirs(folder: Path, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Iterator[str]:
    """The URL of `vllm serve`."""
    log, options = tmp_path_factory.mktemp("vllm-serve") / "log", ("--structured-outputs-config", _COMPACT)
    with vllm_cases.own_server(folder, log, free_port(), "--max-model-len", str(_MAX_LEN), *options) as url:
        yield url


@pytest.fixture(scope="module")
def ours(folder: Path, serving_ray: Callable[[], AbstractContextManager[int]]) -> Iterator[str]:
    """The URL of our endpoint."""
    with serving_ray() as port:
        spec = ServeSpec(models={"m": str(folder)}, port=port, engine="vllm", max_concurrency=8,
                         max_model_len=_MAX_LEN, kv_cache_bytes=vllm_cases.KV_BYTES)  # fmt: skip
        with serve_in_background(spec) as running:
            yield running.url


@pytest.fixture(scope="module")
def pair(ours: str, theirs: str) -> Iterator[Pair]:
    with vllm_cases.clients(ours, theirs) as made:
        yield made


def test_models_are_listed_alike_and_ours_are_shown_too(pair: Pair) -> None:
    def ask(client: openai.OpenAI) -> Any:
        page = client.models.list()
        # Beside these ours have the version that is served, and theirs the folder and what keys may do.
        lengths = [(card.model_extra or {})["max_model_len"] for card in page.data]
        return page.object, lengths, [(card.id, card.object, type(card.created)) for card in page.data]

    assert both(pair, ask) == ("list", [_MAX_LEN], [("m", "model", int)])
    # vLLM 0.32 has no such route, and OpenAI's API has.
    shown = pair[0].models.retrieve("m")
    assert shown == pair[0].models.list().data[0]
    with pytest.raises(openai.NotFoundError):
        pair[0].models.retrieve("nobody")


def _chat(client: openai.OpenAI, **asked: Any) -> list[tuple[Any, ...]]:
    given = {name: value for name, value in (_CHAT | asked).items() if value is not None}
    reply = client.chat.completions.create(model="m", **given)
    assert reply.usage is not None
    usage = (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens)
    return [usage, *((one.index, one.message.role, one.message.content, one.finish_reason) for one in reply.choices)]


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 0},
        {"temperature": 0, "max_completion_tokens": 5, "max_tokens": None},
        {"temperature": 0.8, "seed": 7},
        {"temperature": 0.8, "seed": 7, "top_p": 0.5},
        {"temperature": 0.8, "seed": 7, "n": 3},
        {"seed": 7, "max_tokens": None},  # as the folder wishes
        {"seed": 7, "temperature": 1, "top_p": 1, "extra_body": {"top_k": -1, "repetition_penalty": 1}},
        {"seed": 7, "extra_body": {"min_p": 0.3, "top_k": 5}},
        {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": -0.5},
        {"temperature": 0, "extra_body": {"repetition_penalty": 1.9}},
        {"temperature": 0, "messages": [{"role": "system", "content": "be kind"}, *_CHAT["messages"]]},
    ],
    ids=json.dumps,
)
def test_chats_are_answered_alike(pair: Pair, asked: dict[str, Any]) -> None:
    both(pair, lambda client: _chat(client, **asked))


def test_a_stop_string_ends_both_at_the_same_place(pair: Pair) -> None:
    whole = pair[1].completions.create(model="m", temperature=0, **_TEXT).choices[0].text
    stop = whole[len(whole) // 2 :][:3]
    assert stop
    both(
        pair,
        lambda client: [
            (one.text, one.finish_reason)
            for one in client.completions.create(model="m", temperature=0, stop=[stop], **_TEXT).choices
        ],
    )


def test_log_probabilities_are_the_same(pair: Pair) -> None:
    ours, theirs = (
        client.chat.completions.create(model="m", temperature=0, logprobs=True, top_logprobs=3, **_CHAT)
        for client in pair
    )
    found = [reply.choices[0].logprobs for reply in (ours, theirs)]
    assert found[0] is not None
    assert found[0].content
    assert found[1] is not None
    assert found[1].content
    assert [one.token for one in found[0].content] == [one.token for one in found[1].content]
    for one, other in zip(found[0].content, found[1].content, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [top.token for top in one.top_logprobs] == [top.token for top in other.top_logprobs]
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(
            [t.logprob for t in other.top_logprobs], abs=1e-4
        )


def test_streams_say_the_same_and_end_with_the_usage(pair: Pair) -> None:
    def ask(client: openai.OpenAI) -> tuple[Any, ...]:
        chunks = list(client.chat.completions.create(
            model="m", temperature=0, stream=True, stream_options={"include_usage": True}, **_CHAT
        ))  # fmt: skip
        *answer, last = chunks
        assert last.usage is not None
        assert not last.choices
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        reasons = [chunk.choices[0].finish_reason for chunk in answer if chunk.choices[0].finish_reason]
        usage = (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens)
        return text, reasons, answer[0].choices[0].delta.role, last.object, usage

    both(pair, ask)


_KEPT: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": _SCHEMA}}


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_a_json_schema_holds_both_to_the_same_answer_whole_and_streamed(pair: Pair, seed: int | None) -> None:
    asked = _CHAT | {"max_tokens": 80, "seed": seed, "temperature": 0 if seed is None else 1, "response_format": _KEPT}

    def ask(client: openai.OpenAI) -> Any:
        whole = _chat(client, **asked)[1]
        chunks = client.chat.completions.create(model="m", stream=True, **asked)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole[2]
        return whole

    *_, content, reason = both(pair, ask)
    assert reason == "stop"
    jsonschema_rs.validate(_SCHEMA, json.loads(content))


def test_a_json_object_without_a_schema_is_begun_alike(pair: Pair) -> None:
    """The model has no reason to end one: what is compared is as much as its tokens allow."""
    content = both(pair, lambda client: _chat(client, temperature=0, max_tokens=24,
                                              response_format={"type": "json_object"}))[1][2]  # fmt: skip
    assert isinstance(jiter.from_json(content.encode(), partial_mode="trailing-strings"), dict)


def test_prompts_as_ids_and_several_at_once_are_answered_alike(pair: Pair) -> None:
    for prompt in (["the quick", "a dog"], [5, 6, 7, 8], [[5, 6, 7], [8, 9, 10]]):

        def ask(client: openai.OpenAI, prompt: Any = prompt) -> list[tuple[Any, ...]]:
            reply = client.completions.create(model="m", prompt=prompt, max_tokens=8, temperature=0)
            return [(one.index, one.text, one.finish_reason) for one in reply.choices]

        both(pair, ask)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/chat/completions", _CHAT | {"model": "nobody"}),
        ("/chat/completions", _CHAT | {"model": "m", "temperature": -1}),
        ("/chat/completions", _CHAT | {"model": "m", "top_p": 2}),
        ("/chat/completions", _CHAT | {"model": "m", "n": 0}),
        ("/chat/completions", _CHAT | {"model": "m", "messages": "hello"}),
        ("/chat/completions", {"model": "m"}),
        ("/chat/completions", _CHAT | {"model": "m", "max_tokens": 10_000}),
        ("/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "word " * 2000}]}),
        ("/completions", {"model": "m", "prompt": [1] * 5000}),
        ("/completions", {"model": "m", "prompt": [999_999]}),
        ("/completions", {"model": "m", "prompt": "x", "logprobs": 1000}),
        ("/nothing", {"model": "m"}),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_what_theirs_refuses_ours_refuses_with_the_same_status(
    ours: str, theirs: str, path: str, body: dict[str, Any]
) -> None:
    one, other = (httpx.post(url + path, json=body, timeout=60, trust_env=False) for url in (ours, theirs))
    assert 400 <= other.status_code < 500, other.text
    assert one.status_code == other.status_code, (one.text, other.text)
    assert set(one.json()["error"]) == {"message", "type", "param", "code"}
