"""Our endpoint over vLLM beside vLLM's own server over the same folder: the same answers to the official client.

Where the two refuse, the status is compared: the words of ours are OpenAI's, those of vLLM its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from rayswift.models.init import init_model
from rayswift.serving.app import serve_in_background
from rayswift.serving.environment import interpreter_of
from rayswift.serving.spec import ServeSpec

_FOUND = interpreter_of("vllm", None)
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.long,
    pytest.mark.ray,
    pytest.mark.skipif(_FOUND.problem is not None, reason=f"no serving environment: {_FOUND.problem}"),
]
_MAX_LEN, _KV_BYTES = 256, 2**28
_CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "the quick brown"}], "max_tokens": 12}
_TEXT: dict[str, Any] = {"prompt": "the quick brown fox", "max_tokens": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path) -> Path:
    made = tmp_path_factory.mktemp("as-vllm") / "m"
    init_model(
        str(made), arch="qwen3", layers=2, hidden_size=128, heads=4, kv_heads=2, vocab_size=512,
        train_tokenizer_files=[str(tiny_text)], seed=0,
    )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def theirs(folder: Path, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Iterator[str]:
    """The URL of `vllm serve`."""
    from rayswift.serving.engines.vllm import Vllm

    port, log = free_port(), tmp_path_factory.mktemp("vllm-serve") / "log"
    command = [
        _FOUND.path, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--host", "127.0.0.1", "--port",
        str(port), "--served-model-name", "m", "--dtype", "float32", "--max-model-len", str(_MAX_LEN),
        "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(_KV_BYTES), "--enforce-eager", "--disable-log-stats",
    ]  # fmt: skip
    variables = {**Vllm.environment, **Vllm.environment_on_cpu, "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | variables)
    try:
        deadline = time.monotonic() + 240
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5, trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def ours(folder: Path, serving_ray: Callable[[], AbstractContextManager[int]]) -> Iterator[str]:
    """The URL of our endpoint."""
    with serving_ray() as port:
        spec = ServeSpec(models={"m": str(folder)}, port=port, engine="vllm", max_concurrency=8,
                         max_model_len=_MAX_LEN, kv_cache_bytes=_KV_BYTES)  # fmt: skip
        with serve_in_background(spec) as running:
            yield running.url


@pytest.fixture(scope="module")
def pair(ours: str, theirs: str) -> Iterator[tuple[openai.OpenAI, openai.OpenAI]]:
    with (
        openai.OpenAI(base_url=ours, api_key="none", max_retries=0, timeout=120) as one,
        openai.OpenAI(base_url=theirs, api_key="none", max_retries=0, timeout=120) as other,
    ):
        yield one, other


def _both(pair: tuple[openai.OpenAI, openai.OpenAI], ask: Callable[[openai.OpenAI], Any]) -> None:
    ours, theirs = (ask(client) for client in pair)
    assert ours == theirs


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
        {"temperature": 0, "messages": [{"role": "system", "content": "be kind"}, *_CHAT["messages"]]},
    ],
    ids=json.dumps,
)
def test_chats_are_answered_alike(pair: tuple[openai.OpenAI, openai.OpenAI], asked: dict[str, Any]) -> None:
    _both(pair, lambda client: _chat(client, **asked))


def test_a_stop_string_ends_both_at_the_same_place(pair: tuple[openai.OpenAI, openai.OpenAI]) -> None:
    whole = pair[1].completions.create(model="m", temperature=0, **_TEXT).choices[0].text
    stop = whole[len(whole) // 2 :][:3]
    assert stop
    _both(
        pair,
        lambda client: [
            (one.text, one.finish_reason)
            for one in client.completions.create(model="m", temperature=0, stop=[stop], **_TEXT).choices
        ],
    )


def test_log_probabilities_are_the_same(pair: tuple[openai.OpenAI, openai.OpenAI]) -> None:
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


def test_streams_say_the_same_and_end_with_the_usage(pair: tuple[openai.OpenAI, openai.OpenAI]) -> None:
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

    _both(pair, ask)


def test_prompts_as_ids_and_several_at_once_are_answered_alike(pair: tuple[openai.OpenAI, openai.OpenAI]) -> None:
    for prompt in (["the quick", "a dog"], [5, 6, 7, 8], [[5, 6, 7], [8, 9, 10]]):

        def ask(client: openai.OpenAI, prompt: Any = prompt) -> list[tuple[Any, ...]]:
            reply = client.completions.create(model="m", prompt=prompt, max_tokens=8, temperature=0)
            return [(one.index, one.text, one.finish_reason) for one in reply.choices]

        _both(pair, ask)


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
