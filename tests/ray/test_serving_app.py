"""The endpoint on real Ray Serve with the `local` engine, asked by the official OpenAI client."""

from __future__ import annotations

import http.client
import json
import select
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from rayswift import api
from rayswift.cluster.session import worker_python
from rayswift.errors import ConfigError, ServeError
from rayswift.serving.app import RunningEndpoint, build_app, serve_in_background
from rayswift.serving.auth import fingerprint
from rayswift.serving.process import check_port
from rayswift.serving.spec import ServeSpec
from tests.harness_cases import QUESTIONS, write_answer
from tests.log_cases import files_with

pytestmark = pytest.mark.ray
_KEY = "ray-test-key-5b1f0c"
_SECRET_PROMPT = "zanzibar-prompt-marker"
_MESSAGES: Any = [{"role": "user", "content": f"What does str.upper do? {_SECRET_PROMPT}"}]
_NUM_PLACES = 10


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def endpoint(tiny_model_dir: Path, ray_temp_dir: str) -> Iterator[RunningEndpoint]:
    import ray

    ray.init(
        address="local", num_cpus=2, _temp_dir=ray_temp_dir, include_dashboard=False, log_to_driver=False,
        configure_logging=False, object_store_memory=100 * 2**20, runtime_env=worker_python(),
    )  # fmt: skip
    spec = ServeSpec(
        models={"tiny": str(tiny_model_dir)}, port=_free_port(), api_key_sha256=(fingerprint(_KEY),),
        max_concurrency=8, max_queued=_NUM_PLACES - 8, max_model_len=2048, engine="local", device="cpu",
    )  # fmt: skip
    try:
        with serve_in_background(spec) as running:
            yield running
        assert ray.is_initialized()  # the caller's own cluster is left alone
        check_port(spec.host, spec.port)  # and the port is free again
    finally:
        ray.shutdown()


@pytest.fixture
def client(endpoint: RunningEndpoint) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=endpoint.url, api_key=_KEY, max_retries=0, timeout=60) as made:
        yield made


def _raw(endpoint: RunningEndpoint, method: str, path: str, body: bytes | None = None, **headers: str) -> Any:
    """(status, parsed body) of one request, which must be answered within 20 s."""
    with closing(http.client.HTTPConnection(endpoint.spec.host, endpoint.spec.port, timeout=20)) as connection:
        connection.request(method, path, body, {"Authorization": f"Bearer {_KEY}", **headers})
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_chat_and_completions(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="tiny", messages=_MESSAGES, max_tokens=12, temperature=0)
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage is not None
    assert 0 < reply.usage.completion_tokens <= 12
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    text = client.completions.create(model="tiny", prompt=["import os", "def"], n=2, max_tokens=4, logprobs=2, seed=1)
    assert [choice.index for choice in text.choices] == [0, 1, 2, 3]
    assert text.choices[0].logprobs is not None


def _streamed(client: openai.OpenAI, messages: Any, max_tokens: int) -> str:
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=max_tokens, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    text, usage = "", None
    for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert usage is not None
    assert 0 < usage.completion_tokens <= max_tokens
    return text


def test_tasks_of_the_harness_are_worth_what_they_are_without_a_server(
    endpoint: RunningEndpoint, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As chats and as plain text: the same prompts, and the same greedy answers."""
    pytest.importorskip("lm_eval", reason="needs the extra `harness`")
    monkeypatch.setenv("RAYSWIFT_API_KEY", _KEY)
    for is_chat in (True, False):
        with openai.OpenAI(base_url=endpoint.url, api_key=_KEY, max_retries=0, timeout=60) as client:
            said = [_greedy(client, question, is_chat) for question in QUESTIONS[:4]]
        folder = tmp_path / str(is_chat)
        settings = {"until": ["no such text"], "max_gen_toks": 12}
        write_answer(folder, [*said[:3], f"not {said[3]}"], generation_kwargs=settings)
        options: dict[str, Any] = {"tasks": ("own_answer",), "include_path": str(folder), "chat_template": is_chat}
        served, own = api.evaluate(endpoint.url, **options), api.evaluate(str(tiny_model_dir), **options)
        assert served.harness is not None
        assert own.harness is not None
        assert served.harness.tasks[0].scores == own.harness.tasks[0].scores
        assert served.harness.tasks[0].scores[0].value == 0.75


def _greedy(client: openai.OpenAI, question: str, is_chat: bool) -> str:
    if not is_chat:
        return client.completions.create(model="tiny", prompt=question, max_tokens=12, temperature=0).choices[0].text
    messages: Any = [{"role": "user", "content": question}]
    reply = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0)
    return reply.choices[0].message.content or ""


def test_a_stream_gives_the_text_of_a_whole_reply(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=_MESSAGES, max_tokens=20, temperature=0)
    assert _streamed(client, _MESSAGES, 20) == whole.choices[0].message.content


def test_concurrent_streams_give_the_text_of_one_after_the_other(client: openai.OpenAI) -> None:
    cases = [([{"role": "user", "content": "why " * (1 + 11 * i)}], 10 + 5 * i) for i in range(8)]
    serial = [_streamed(client, *case) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda case: _streamed(client, *case), cases))
    assert together == serial
    assert len(set(serial)) > 4


def test_errors_are_those_of_the_openai_client(client: openai.OpenAI, endpoint: RunningEndpoint) -> None:
    with openai.OpenAI(base_url=endpoint.url, api_key="wrong-key-000", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with pytest.raises(openai.AuthenticationError):
            stranger.chat.completions.create(model="tiny", messages=_MESSAGES)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="nope", messages=_MESSAGES)
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny", prompt="word " * 3000, max_tokens=4, stream=stream)
        assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(model="tiny", messages=_MESSAGES, max_tokens=10**6)


def test_bad_requests_are_answered_and_the_next_good_one_passes(
    client: openai.OpenAI, endpoint: RunningEndpoint
) -> None:
    sent = {"Content-Type": "application/json"}
    cases = [
        (("POST", "/v1/chat/completions", b"{bad"), sent, 400),
        (("POST", "/v1/chat/completions", b"{}"), {"Content-Type": "text/plain"}, 415),
        (("POST", "/v1/chat/completions", b" " * (3 * 2**20)), sent, 413),
        (("GET", "/v1/chat/completions"), {}, 405),
        (("GET", "/v1/nothing"), {}, 404),
        (("GET", "/docs"), {}, 404),
    ]
    for request, headers, status in cases:
        found, body = _raw(endpoint, *request, **headers)
        assert found == status, request
        assert set(body["error"]) == {"message", "type", "param", "code"}
        good = client.completions.create(model="tiny", prompt="x", max_tokens=1)
        assert good.usage is not None


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_places(
    client: openai.OpenAI, endpoint: RunningEndpoint, stream: bool
) -> None:
    """Its places are free while a request that began before it, and is as long, still runs."""
    half = _NUM_PLACES // 2
    with _holding(half, _NUM_PLACES, endpoint, client, stream=False) as witness:
        with _holding(half, half, endpoint, client, stream=stream):
            assert _is_refused(client, num_answers=1)
        _until(lambda: not _is_refused(client, num_answers=1))
        assert not _is_answered(witness)


@contextmanager
def _holding(
    num_answers: int, num_free: int, endpoint: RunningEndpoint, client: openai.OpenAI, *, stream: bool
) -> Iterator[http.client.HTTPConnection]:
    """A connection whose answers hold `num_answers` of the free places, for seconds unless it is closed.

    Whether they do is asked by a probe that wants more places than are then left. Where they do not yet, the probe has
    places itself and may be in the way: the request is then refused at once, and sent again.
    """
    body = {"model": "tiny", "prompt": "x", "max_tokens": 2000, "temperature": 0, "n": num_answers, "stream": stream}
    with ExitStack() as stack:
        connection = stack.enter_context(closing(_begin(endpoint, body)))

        def holds() -> bool:
            nonlocal connection
            if _is_answered(connection):
                response = stack.enter_context(closing(connection.getresponse()))
                if response.status == 200:
                    assert stream, "the answers ended before they were looked at"
                    return True
                assert response.status == 429
                connection = stack.enter_context(closing(_begin(endpoint, body)))
            return not stream and _is_refused(client, num_free - num_answers + 1)

        _until(holds)
        yield connection


def _begin(endpoint: RunningEndpoint, body: dict[str, Any]) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(endpoint.spec.host, endpoint.spec.port, timeout=60)
    headers = {"Authorization": f"Bearer {_KEY}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection


def _is_answered(connection: http.client.HTTPConnection) -> bool:
    """Whether there is something to read: for a request without a stream, its whole answer or its refusal."""
    return bool(select.select([connection.sock], [], [], 0)[0])


def _is_refused(client: openai.OpenAI, num_answers: int) -> bool:
    """Whether a request is refused for want of places."""
    try:
        client.completions.create(model="tiny", prompt="x", max_tokens=1, n=num_answers)
    except openai.RateLimitError as error:
        return int(error.response.headers["retry-after"]) >= 1
    return False


def _until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        threading.Event().wait(0.02)


def test_logs_hold_neither_keys_nor_prompts(
    client: openai.OpenAI, endpoint: RunningEndpoint, ray_temp_dir: str
) -> None:
    client.chat.completions.create(model="tiny", messages=_MESSAGES, max_tokens=2)
    _raw(endpoint, "POST", "/v1/chat/completions", f'{{"{_SECRET_PROMPT}": '.encode())
    session = (Path(ray_temp_dir) / "session_latest").resolve()  # earlier ones may hold this file, in a job's checkout
    assert any(path.name.startswith("replica_") for path in files_with(session, "rayswift"))
    for secret in (_KEY, _SECRET_PROMPT):
        assert files_with(session, secret) == []


def test_a_port_in_use_is_told_before_anything_starts(endpoint: RunningEndpoint) -> None:
    with pytest.raises(ServeError, match=rf"port={endpoint.spec.port} cannot be listened on .*--port"):
        serve_in_background(endpoint.spec)


def test_a_second_endpoint_on_the_same_cluster_is_refused(endpoint: RunningEndpoint) -> None:
    with pytest.raises(ServeError, match="Ray Serve already runs"):
        serve_in_background(endpoint.spec.model_copy(update={"port": _free_port()}))
    assert endpoint.url  # and the first one was not taken down:
    assert _raw(endpoint, "GET", "/health") == (200, {"status": "ok"})


def test_what_cannot_be_served_is_refused_without_a_cluster(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ServeError, match=r"host=0\.0\.0\.0 .*--api-key-file"):
        build_app(ServeSpec(models={"m": str(tiny_model_dir)}, host="0.0.0.0"))
    with pytest.raises(ConfigError, match=r"models\.m=.*is not a folder"):
        build_app(ServeSpec(models={"m": str(tmp_path / "absent")}))
    with pytest.raises(ConfigError, match="did you mean local"):
        build_app(ServeSpec(models={"m": str(tiny_model_dir)}, engine="locale"))
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model_dir, broken)
    (broken / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ConfigError, match=r"broken model\.safetensors"):
        build_app(ServeSpec(models={"m": str(broken)}))
