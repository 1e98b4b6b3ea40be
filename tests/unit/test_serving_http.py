"""The endpoint over a fake engine, without Ray: every status, body shape and header, streams, queue and disconnects."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from rayswift.models.loading import load_tokenizer
from rayswift.serving import auth
from rayswift.serving.admission import Admission
from rayswift.serving.engine import Delta, FakeEngine, Refused, Request, TokenLogprob
from rayswift.serving.http import build_asgi
from rayswift.serving.prompts import PromptBuilder
from rayswift.serving.replies import Answer, Reply
from rayswift.serving.served import ServedModel
from rayswift.serving.spec import ServeSpec

_KEY = "a-key-for-tests-0123"
_CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
_TEXT = "Hello, wörld!"


class _Server:
    """An app over a fake engine, and what is needed to look inside."""

    def __init__(self, prompts: PromptBuilder, engine: FakeEngine | None = None, **spec: Any) -> None:
        self.spec = ServeSpec(models={"m": "unused"}, **{"max_body_bytes": 4000, **spec})
        self.engine = engine or FakeEngine()
        self.admission = Admission(self.spec.max_concurrency, self.spec.max_queued)
        self.app = build_asgi(self.spec, {"m": ServedModel(self.engine, prompts, self.admission)})

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://localhost", timeout=20)

    def ask(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        async def once() -> httpx.Response:
            async with self.client() as client:
                return await client.request(method, path, **kwargs)

        return asyncio.run(once())

    def chat(self, **fields: Any) -> httpx.Response:
        return self.ask("POST", "/v1/chat/completions", json=_CHAT | fields)

    def text(self, **fields: Any) -> httpx.Response:
        return self.ask("POST", "/v1/completions", json={"model": "m", "prompt": "hi"} | fields)


@pytest.fixture(scope="module")
def prompts(tiny_model_dir: Path) -> PromptBuilder:
    return PromptBuilder(load_tokenizer(str(tiny_model_dir)))


@pytest.fixture
def make(prompts: PromptBuilder) -> Callable[..., _Server]:
    return lambda *args, **spec: _Server(prompts, *args, **spec)


def _events(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def test_models_and_health(make: Callable[..., _Server]) -> None:
    server = make()
    assert [card["id"] for card in server.ask("GET", "/v1/models").json()["data"]] == ["m"]
    assert server.ask("GET", "/v1/models/m").json()["object"] == "model"
    assert server.ask("GET", "/v1/models/a/b").json()["error"]["code"] == "model_not_found"
    assert server.ask("GET", "/health").json() == {"status": "ok"}
    server.engine.failure = "gone"
    assert server.ask("GET", "/health").status_code == 503


def test_chat_reply(make: Callable[..., _Server]) -> None:
    server = make()
    body = server.chat(temperature=0, seed=3).json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": _TEXT, "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    num_prompt = len(server.engine.seen[0].prompt.ids)
    assert body["usage"] == {
        "prompt_tokens": num_prompt, "completion_tokens": 4, "total_tokens": num_prompt + 4
    }  # fmt: skip
    assert server.engine.seen[0].sampling.temperature == 0
    assert server.admission.in_flight == 0


def test_the_prompt_is_the_chat_template_of_the_model(make: Callable[..., _Server], tiny_model_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model_dir))
    turns = [{"role": "developer", "content": "Be short."}, {"role": "user", "content": "hi"}]
    server = make()
    server.chat(messages=turns)
    turns[0]["role"] = "system"
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(server.engine.seen[0].prompt.ids) == expected


def test_text_reply_for_several_prompts_and_answers(make: Callable[..., _Server]) -> None:
    server = make()
    body = server.text(prompt=["a", "b"], n=2, max_tokens=2, seed=1).json()
    assert body["object"] == "text_completion"
    assert [(c["index"], c["text"], c["finish_reason"]) for c in body["choices"]] == [
        (i, "Hello, ", "length") for i in range(4)
    ]
    assert [request.sampling.seed for request in server.engine.seen] == [1, 2, 1, 2]
    assert body["usage"]["prompt_tokens"] == 2  # each prompt counted once
    assert body["usage"]["completion_tokens"] == 8
    assert server.text(prompt=[5, 6, 7]).json()["usage"]["prompt_tokens"] == 3


def test_chat_stream_with_usage(make: Callable[..., _Server]) -> None:
    server = make()
    *chunks, last, done = _events(server.chat(stream=True, stream_options={"include_usage": True}))
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == _TEXT
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    assert len({c["id"] for c in [*chunks, last]}) == 1
    assert server.admission.in_flight == 0


def test_text_stream_of_several_answers(make: Callable[..., _Server]) -> None:
    *chunks, done = _events(make().text(stream=True, n=3))
    assert done == "[DONE]"
    for index in range(3):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in mine) == _TEXT
        assert mine[-1]["finish_reason"] == "stop"
    assert all("usage" not in c for c in chunks)


def test_logprobs(make: Callable[..., _Server]) -> None:
    content = make().chat(logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]["content"]
    assert [item["token"] for item in content] == ["Hello", ", ", "wörld", "!"]
    assert content[2]["bytes"] == list("wörld".encode())
    assert content[0]["top_logprobs"] == [{"token": "Hello", "logprob": -0.5, "bytes": list(b"Hello")}]
    logprobs = make().text(logprobs=2).json()["choices"][0]["logprobs"]
    assert logprobs["text_offset"] == [0, 5, 7, 12]
    assert logprobs["top_logprobs"][0] == {"Hello": -0.5, "other": -1.5}


def test_the_chosen_token_is_always_among_the_likeliest() -> None:
    scored = TokenLogprob("rare", -9.0, (("Hello", -0.5), ("other", -1.5)))
    answer = Answer(0)
    answer.add(Delta("rare", 1, "length", (scored,)))
    [choice] = Reply("m", chat=False).body([answer], {})["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{"Hello": -0.5, "other": -1.5, "rare": -9.0}]


def test_offsets_count_the_texts_of_tokens_whole_and_streamed() -> None:
    """Not the text that is out: some is held back, which a stop string or a character might end."""
    tokens = (TokenLogprob("St", -1.0), TokenLogprob("\ufffd", -1.0), TokenLogprob("é", -1.0),
              TokenLogprob("<s>", -1.0, is_special=True), TokenLogprob("op", -1.0))  # fmt: skip
    texts, answer, streamed = ("", "", "", "", "Stéop"), Answer(0), []
    for text, token in zip(texts, tokens, strict=True):
        answer.add(delta := Delta(text, 1, "length" if text else None, (token,)))
        chunk = Reply("m", chat=False).chunk(answer, delta)
        assert chunk is not None
        streamed += chunk["choices"][0]["logprobs"]["text_offset"]
    [choice] = Reply("m", chat=False).body([answer], {})["choices"]
    assert choice["logprobs"]["text_offset"] == streamed == [0, 2, 2, 3, 3]


def test_a_conversation_of_several_turns_with_the_official_client(make: Callable[..., _Server]) -> None:
    import openai

    async def scenario() -> None:
        server = make()
        async with openai.AsyncOpenAI(
            base_url="http://localhost/v1", api_key="none", max_retries=0, http_client=server.client()
        ) as client:
            turns: list[Any] = [{"role": "user", "content": "hi"}]
            first = await client.chat.completions.create(model="m", messages=turns, max_tokens=8)
            for answer in (first.choices[0].message, first.choices[0].message.model_dump()):
                more = [*turns, answer, {"role": "user", "content": "more"}]
                reply = await client.chat.completions.create(model="m", messages=more, max_tokens=8)
                assert reply.choices[0].message.content == _TEXT

    asyncio.run(scenario())


_JSON = {"content-type": "application/json"}
_BAD: list[tuple[str, str, dict[str, Any], int, str]] = [
    ("POST", "/v1/chat/completions", {"json": _CHAT | {"model": "nope"}}, 404, "model_not_found"),
    ("POST", "/v1/chat/completions", {"content": b"{bad", "headers": _JSON}, 400, "invalid_json"),
    ("POST", "/v1/chat/completions", {"content": b"", "headers": _JSON}, 400, "invalid_json"),
    ("POST", "/v1/chat/completions", {"content": b"{}"}, 415, "unsupported_media_type"),
    ("POST", "/v1/chat/completions", {"content": b"x" * 4001, "headers": _JSON}, 413, "request_too_large"),
    ("POST", "/v1/chat/completions", {"json": _CHAT | {"n": 99}}, 400, "invalid_value"),
    ("POST", "/v1/chat/completions", {"json": _CHAT | {"temperature": 3}}, 400, "invalid_value"),
    ("POST", "/v1/completions", {"json": {"model": "m", "prompt": "word " * 300}}, 400, "context_length_exceeded"),
    ("POST", "/v1/completions", {"json": {"model": "m", "prompt": ""}}, 400, "invalid_value"),
    ("POST", "/v1/completions", {"json": {"model": "m", "prompt": [10**6]}}, 400, "invalid_value"),
    ("GET", "/v1/chat/completions", {}, 405, "method_not_allowed"),
    ("DELETE", "/v1/models", {}, 405, "method_not_allowed"),
    ("POST", "/v1/audio/speech", {"json": {}}, 404, "unknown_url"),
    ("GET", "/docs", {}, 404, "unknown_url"),
]


@pytest.mark.parametrize(("method", "path", "kwargs", "status", "code"), _BAD)
def test_bad_requests_get_an_openai_error_and_the_next_one_passes(
    make: Callable[..., _Server], method: str, path: str, kwargs: dict[str, Any], status: int, code: str
) -> None:
    server = make()
    response = server.ask(method, path, **kwargs)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert server.chat().status_code == 200
    assert server.admission.in_flight == 0


@pytest.mark.parametrize("more", [{"prompt": "word " * 300}, {"prompt": [1] * 64}, {"prompt": "a", "max_tokens": 64}])
def test_a_text_that_does_not_fit_is_the_prompts_fault(make: Callable[..., _Server], more: dict[str, Any]) -> None:
    error = make().ask("POST", "/v1/completions", json={"model": "m"} | more).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


def test_a_body_that_is_sent_in_pieces_is_limited_too(make: Callable[..., _Server]) -> None:
    async def endless() -> Any:
        for _ in range(100):
            yield b"x" * 1000

    response = make().ask("POST", "/v1/completions", content=endless(), headers=_JSON)
    assert response.status_code == 413


def test_a_conversation_the_template_refuses(prompts: PromptBuilder, tiny_model_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model_dir))
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    error = _Server(PromptBuilder(tokenizer)).chat().json()["error"]
    assert "roles must alternate" in error["message"]
    tokenizer.chat_template = "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
    error = _Server(PromptBuilder(tokenizer)).chat().json()["error"]
    assert (error["param"], error["code"]) == ("messages", "invalid_value")
    tokenizer.chat_template = None
    assert _Server(PromptBuilder(tokenizer)).chat().json()["error"]["code"] == "no_chat_template"


def test_a_token_that_the_model_has_no_vector_for(tiny_model_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model_dir))
    known = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[LATER]"})  # as many did without asking the model
    server = _Server(PromptBuilder(tokenizer, num_ids=known))
    for error in (
        server.chat(messages=[{"role": "user", "content": "say [LATER] now"}]).json()["error"],
        server.ask("POST", "/v1/completions", json={"model": "m", "prompt": "a[LATER]"}).json()["error"],
    ):
        assert "has the token [LATER], of which this model knows nothing" in error["message"]
        assert error["param"] in ("messages", "prompt")
    told = server.ask("POST", "/v1/completions", json={"model": "m", "prompt": [1, known + 7]}).json()["error"]
    assert f"token ids must be below {known}" in told["message"]
    assert server.chat().status_code == 200
    roomy = _Server(PromptBuilder(tokenizer, num_ids=known + 64))  # rows that no token has yet are vectors, too
    assert roomy.ask("POST", "/v1/completions", json={"model": "m", "prompt": [1, known + 7]}).status_code == 200


def test_a_key_is_asked_for(make: Callable[..., _Server]) -> None:
    server = make(api_key_sha256=(auth.fingerprint("another-key-0123"), auth.fingerprint(_KEY)))
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": _KEY}, {"authorization": f"Basic {_KEY}"}):
        response = server.ask("GET", "/v1/models", headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert server.ask("GET", f"/v1/models?api_key={_KEY}").status_code == 401
    assert server.ask("GET", "/v1/unknown").status_code == 401  # nothing is told to strangers
    assert server.ask("GET", "/v1/models", headers={"authorization": f"Bearer {_KEY}"}).status_code == 200
    assert server.ask("GET", "/health").status_code == 200


def test_without_a_key_only_localhost_may_be_addressed(make: Callable[..., _Server]) -> None:
    server = make()
    assert server.ask("GET", "/v1/models", headers={"host": "evil.example"}).status_code == 403
    for host in ("localhost:8000", "127.0.0.1:1", "[::1]:8000"):
        assert server.ask("GET", "/v1/models", headers={"host": host}).status_code == 200


def test_no_cors_headers(make: Callable[..., _Server]) -> None:
    response = make().ask("OPTIONS", "/v1/chat/completions", headers={"origin": "http://evil.example"})
    assert response.status_code == 405
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_a_full_queue_answers_429_and_frees_its_places(make: Callable[..., _Server]) -> None:
    async def scenario() -> None:
        gate = asyncio.Event()
        server = make(FakeEngine(gate=gate), max_concurrency=1, max_queued=1)
        async with server.client() as client:
            asks = [asyncio.create_task(client.post("/v1/chat/completions", json=_CHAT)) for _ in range(2)]
            await _until(lambda: server.admission.in_flight == 2)
            refused = await client.post("/v1/chat/completions", json=_CHAT)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "requests"
            gate.set()
            assert [response.status_code for response in await asyncio.gather(*asks)] == [200, 200]
            assert (await client.post("/v1/chat/completions", json=_CHAT)).status_code == 200
        assert server.admission.in_flight == 0

    asyncio.run(scenario())


def test_more_answers_than_places_are_refused_for_good(make: Callable[..., _Server]) -> None:
    assert make(max_concurrency=1, max_queued=1).chat(n=3).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_a_failing_engine_is_a_503_that_tells_nothing(
    make: Callable[..., _Server], stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    server = make(FakeEngine(failure="secret internals"))
    response = server.chat(stream=stream)
    assert response.status_code == 503
    assert "secret" not in response.text
    assert "secret internals" in caplog.text
    assert server.admission.in_flight == 0


def test_an_engine_that_fails_midway_ends_the_stream_with_an_error_event(make: Callable[..., _Server]) -> None:
    async def scenario() -> None:
        gate = asyncio.Event()
        engine = FakeEngine(gate=gate)
        server = make(engine)
        async with server.client() as client:
            ask = asyncio.create_task(
                client.post("/v1/completions", json={"model": "m", "prompt": "x", "stream": True})
            )
            await _until(lambda: engine.running == 1)
            engine.failure = "secret internals"
            gate.set()
            *_, last = _events(await ask)
        assert last["error"]["type"] == "server_error"
        assert "secret" not in json.dumps(last)

    asyncio.run(scenario())


def test_a_bug_is_a_500_that_tells_nothing(
    make: Callable[..., _Server], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(PromptBuilder, "chat", lambda *_: 1 / 0)
    server = make()
    response = server.chat()
    assert response.status_code == 500
    assert "division" not in response.text
    assert "ZeroDivisionError" in caplog.text


def test_an_answer_that_takes_too_long_is_given_up(make: Callable[..., _Server]) -> None:
    server = make(FakeEngine(gate=asyncio.Event()), request_timeout_s=0.05)
    response = server.chat()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "timeout")
    assert response.headers["retry-after"] == "1"
    assert (server.engine.running, server.admission.in_flight) == (0, 0)


def _slow_prompts(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Prompts of conversations that are not made before the event."""
    made, own = threading.Event(), PromptBuilder.chat

    def chat(*given: Any) -> Any:
        assert made.wait(30)
        return own(*given)

    monkeypatch.setattr(PromptBuilder, "chat", chat)
    return made


def test_a_prompt_that_takes_too_long_is_given_up(
    make: Callable[..., _Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, server = _slow_prompts(monkeypatch), make(request_timeout_s=1, max_concurrency=1, max_queued=0)

    async def scenario() -> None:
        async with server.client() as client:
            try:
                reply = await client.post("/v1/chat/completions", json=_CHAT)
                assert (reply.status_code, reply.json()["error"]["code"]) == (503, "timeout")
                assert server.admission.in_flight == 0
                by_ids = await client.post("/v1/completions", json={"model": "m", "prompt": [5, 6]})
                assert by_ids.status_code == 200
            finally:
                made.set()

    asyncio.run(scenario())
    assert [len(request.prompt.ids) for request in server.engine.seen] == [2]  # nothing comes of it later


def test_who_goes_away_before_there_is_a_prompt_frees_its_place(
    make: Callable[..., _Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, server, sent = _slow_prompts(monkeypatch), make(), list[Any]()
    messages = iter([{"type": "http.request", "body": json.dumps(_CHAT).encode()}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        sent.append(message)

    async def scenario() -> None:
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        path = "/v1/chat/completions"
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
        try:
            await asyncio.wait_for(server.app(scope, receive, send), 20)
        finally:
            made.set()

    asyncio.run(scenario())
    assert (sent[0]["status"], server.admission.in_flight, server.engine.seen) == (499, 0, [])


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(make: Callable[..., _Server], stream: bool) -> None:
    async def scenario() -> None:
        server, gone = make(FakeEngine(gate=asyncio.Event())), asyncio.Event()
        body = json.dumps(_CHAT | {"stream": stream, "n": 2}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            return None

        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "path": "/v1/chat/completions", "raw_path": b"/", "query_string": b"", "root_path": "", "scheme": "http",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }  # fmt: skip
        call = asyncio.create_task(server.app(scope, receive, send))
        await _until(lambda: server.engine.running == 2)
        assert server.admission.in_flight == 2
        gone.set()
        await asyncio.wait_for(call, 10)
        assert (server.engine.running, server.admission.in_flight) == (0, 0)

    asyncio.run(scenario())


async def _until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)


def test_an_adapter_is_asked_for_as_model_and_name(make: Callable[..., _Server], tmp_path: Path) -> None:
    (tmp_path / "ad").mkdir()
    (tmp_path / "ad/adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "ad/adapter_model.safetensors").write_bytes(b"x")
    server = make(adapters={"m": str(tmp_path)})
    assert server.text(model="m:ad").json()["model"] == "m:ad"
    adapter = server.engine.seen[-1].adapter
    assert adapter is not None
    assert (adapter.name, adapter.folder) == ("ad", str((tmp_path / "ad").resolve()))
    server.text()
    assert server.engine.seen[-1].adapter is None
    cards = server.ask("GET", "/v1/models").json()["data"]
    assert [(card["id"], card.get("parent")) for card in cards] == [("m", None), ("m:ad", "m")]
    assert server.ask("GET", "/v1/models/m:ad").json()["parent"] == "m"
    for name in ("m:", "m:absent", "m:../ad", "x:ad", ":ad"):
        assert server.text(model=name).json()["error"]["code"] == "model_not_found"
    assert make().text(model="m:ad").json()["error"]["code"] == "model_not_found"


def test_what_an_engine_refuses_is_a_bad_request(make: Callable[..., _Server]) -> None:
    class Refusing(FakeEngine):
        async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
            raise Refused("the adapter x does not fit this model")
            yield  # an async generator, as the protocol asks

    reply = make(Refusing()).text()
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, "the adapter x does not fit this model")


_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("given", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": _SCHEMA}}, _SCHEMA),
    ],
)
def test_a_response_format_reaches_an_engine_that_can_keep_to_it(
    make: Callable[..., _Server], given: dict[str, Any], schema: Any
) -> None:
    server = make(FakeEngine(can_constrain=True))
    assert server.chat(response_format=given).status_code == 200
    reached = server.engine.seen[-1].sampling.json_schema
    assert (None if reached is None else json.loads(reached)) == schema
    plain = make().chat(response_format=given)
    assert (plain.status_code == 200) == (schema is None)
    if schema is not None:
        assert plain.json()["error"]["param"] == "response_format"


def _deep(levels: int) -> dict[str, Any]:
    return {"a": _deep(levels - 1)} if levels else {}


@pytest.mark.parametrize(
    "given",
    [
        {"type": "json_schema"},
        {"type": "json_object", "json_schema": {"name": "x", "schema": {}}},
        {"type": "grammar"},
        {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "more": 1}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": _deep(40)}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["y" * 40_000]}}},
    ],
)
def test_a_response_format_beyond_its_bounds_is_refused(make: Callable[..., _Server], given: dict[str, Any]) -> None:
    reply = make(FakeEngine(can_constrain=True), max_body_bytes=100_000).chat(response_format=given)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"].startswith("response_format")


def test_every_reply_names_the_version_that_answered(prompts: PromptBuilder) -> None:
    server = _Server(prompts)
    model = ServedModel(FakeEngine(), prompts, Admission(4, 4), version="0123456789ab")
    server.app = build_asgi(server.spec, {"m": model})
    asked = {"X-RaySwift-Version": "0123456789ab"}
    by_name = server.ask("POST", "/v1/chat/completions", json=_CHAT, headers=asked)
    for reply in (server.chat(), server.text(), by_name):
        assert reply.headers["X-RaySwift-Version"] == "0123456789ab"
        assert reply.json()["system_fingerprint"] == "0123456789ab"
    streamed = server.chat(stream=True)
    assert streamed.headers["X-RaySwift-Version"] == "0123456789ab"
    assert {chunk["system_fingerprint"] for chunk in _events(streamed)[:-1]} == {"0123456789ab"}
    other = server.ask("POST", "/v1/chat/completions", json=_CHAT, headers={"X-RaySwift-Version": "ffff"})
    assert (other.status_code, other.json()["error"]["code"]) == (404, "version_not_found")


def test_a_folder_that_is_no_export_has_no_version(make: Callable[..., _Server]) -> None:
    reply = make().chat()
    assert reply.json()["system_fingerprint"] is None
    assert "X-RaySwift-Version" not in reply.headers
