"""Keys with limits over HTTP, with a fake engine and a clock that only the test moves."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from rayswift.models.loading import load_tokenizer
from rayswift.serving import auth, keys
from rayswift.serving.admission import Admission
from rayswift.serving.engine import FakeEngine
from rayswift.serving.http import build_asgi
from rayswift.serving.limits import SECOND_NS
from rayswift.serving.prompts import PromptBuilder
from rayswift.serving.served import ServedModel
from rayswift.serving.spec import ServeSpec

_PROMPT = "a-prompt-that-is-logged-nowhere"
_CHAT = {"model": "m", "messages": [{"role": "user", "content": _PROMPT}]}
_RATE = ("x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests")


class _Server:
    """An app over fake engines `m` and `other`, with the keys alice (limited as told) and bob (free)."""

    def __init__(self, prompts: PromptBuilder, file: Path, gate: asyncio.Event | None = None, **limits: Any) -> None:
        self.alice = keys.add(str(file), "alice", **limits)
        self.bob = keys.add(str(file), "bob")
        spec = ServeSpec(models={"m": "unused", "other": "unused"}, api_key_file=str(file), max_body_bytes=4000)
        self.engine, self.now_ns = FakeEngine(gate=gate), 0
        model = ServedModel(self.engine, prompts, Admission(spec.max_concurrency, spec.max_queued))
        self.app = build_asgi(auth.secured(spec, {}), {"m": model, "other": model}, now_ns=lambda: self.now_ns)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://localhost", timeout=20)

    def ask(self, method: str, path: str, key: str | None = None, **kwargs: Any) -> httpx.Response:
        async def once() -> httpx.Response:
            async with self.client() as client:
                return await client.request(method, path, headers=_bearer(key or self.alice), **kwargs)

        return asyncio.run(once())

    def chat(self, key: str | None = None, **fields: Any) -> httpx.Response:
        return self.ask("POST", "/v1/chat/completions", key, json=_CHAT | fields)


@pytest.fixture(scope="module")
def prompts(tiny_model_dir: Path) -> PromptBuilder:
    return PromptBuilder(load_tokenizer(str(tiny_model_dir)))


@pytest.fixture
def make(prompts: PromptBuilder, tmp_path: Path) -> Callable[..., _Server]:
    return lambda **limits: _Server(prompts, tmp_path / "keys.yaml", **limits)


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def _rate(response: httpx.Response) -> tuple[str | None, ...]:
    return tuple(response.headers.get(name) for name in _RATE)


def test_over_the_limit_is_a_429_until_the_window_has_moved(make: Callable[..., _Server]) -> None:
    server = make(requests_per_minute=2)
    assert _rate(server.chat()) == ("2", "1", "60s")
    server.now_ns += 20 * SECOND_NS
    streamed = server.chat(stream=True)
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert _rate(streamed) == ("2", "0", "60s")
    refused = server.chat()
    assert (refused.status_code, _rate(refused)) == (429, ("2", "0", "60s"))
    assert refused.headers["retry-after"] == "40"
    error = refused.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
    assert len(server.engine.seen) == 2
    assert server.chat(server.bob).status_code == 200  # nobody else is counted
    server.now_ns += 40 * SECOND_NS
    assert _rate(server.chat()) == ("2", "0", "60s")
    assert server.chat().status_code == 429


def test_every_answer_of_a_limited_key_has_the_headers_and_no_other(make: Callable[..., _Server]) -> None:
    server = make(requests_per_minute=9)
    answers = [server.chat(temperature=9), server.chat(model="nope"), server.ask("GET", "/x"), server.chat()]
    assert [answer.status_code for answer in answers] == [400, 404, 404, 200]
    assert [_rate(answer)[1] for answer in answers] == ["8", "7", "6", "5"]
    assert _rate(server.ask("GET", "/v1/models"))[1] == "4"
    assert _rate(server.ask("GET", "/health")) == (None, None, None)
    assert _rate(server.chat(server.bob)) == (None, None, None)


def test_a_wrong_key_is_a_401_as_ever_and_counts_against_nobody(make: Callable[..., _Server]) -> None:
    server = make(requests_per_minute=1)
    for wrong in ("rsk-wrong", auth.fingerprint(server.alice)):
        response = server.chat(wrong)
        assert (response.status_code, _rate(response)) == (401, (None, None, None))
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"] == {
            "message": "Incorrect API key provided", "type": "invalid_request_error", "param": None,
            "code": "invalid_api_key",
        }  # fmt: skip
    assert server.chat().status_code == 200


def test_a_key_sees_and_asks_its_own_models_only(make: Callable[..., _Server]) -> None:
    server = make(models=["m", "not-served"])
    assert [card["id"] for card in server.ask("GET", "/v1/models").json()["data"]] == ["m"]
    assert server.ask("GET", "/v1/models/m").status_code == 200
    assert server.chat().status_code == 200
    assert server.chat(model="not-served").status_code == 404
    for answer in (server.chat(model="other"), server.chat(model="unheard-of"), server.ask("GET", "/v1/models/other"),
                   server.ask("POST", "/v1/completions", json={"model": "other", "prompt": "x"})):  # fmt: skip
        assert answer.status_code == 403
        error = answer.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("permission_error", "model_not_allowed", "model")
    assert len(server.engine.seen) == 1
    assert [card["id"] for card in server.ask("GET", "/v1/models", server.bob).json()["data"]] == ["m", "other"]
    assert server.chat(server.bob, model="other").status_code == 200


def test_a_revoked_key_is_refused_after_a_restart(prompts: PromptBuilder, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    server = _Server(prompts, file)
    keys.revoke(str(file), "alice")
    keys.revoke(str(file), "bob")
    assert server.chat().status_code == 200  # the file is read when the endpoint starts
    restarted = _Server(prompts, file)
    assert restarted.chat(server.alice).status_code == 401
    assert restarted.chat().status_code == 200


def test_a_key_known_both_ways_is_limited(make: Callable[..., _Server], prompts: PromptBuilder) -> None:
    limited = make(requests_per_minute=1)
    spec = ServeSpec(
        models={"m": "unused"},
        api_key_sha256=(auth.fingerprint(limited.alice),),
        api_keys=({"name": "alice", "sha256": auth.fingerprint(limited.alice), "requests_per_minute": 1},),
    )
    limited.app = build_asgi(spec, {"m": ServedModel(FakeEngine(), prompts, Admission(1, 1))})
    assert [limited.chat().status_code for _ in range(2)] == [200, 429]


def test_requests_at_the_same_time_are_limited(make: Callable[..., _Server]) -> None:
    async def scenario() -> None:
        gate = asyncio.Event()
        server = make(max_concurrency=2, gate=gate)
        async with server.client() as client:

            def post(key: str) -> Awaitable[httpx.Response]:
                return client.post("/v1/chat/completions", json=_CHAT, headers=_bearer(key))

            asks = [asyncio.ensure_future(post(server.alice)) for _ in range(2)]
            await _until(lambda: server.engine.running == 2)
            refused = await post(server.alice)
            assert (refused.status_code, refused.headers["retry-after"], _rate(refused)[0]) == (429, "1", None)
            assert "2 requests at the same time" in refused.json()["error"]["message"]
            free = asyncio.ensure_future(post(server.bob))
            await _until(lambda: server.engine.running == 3)
            gate.set()
            assert [answer.status_code for answer in await asyncio.gather(*asks, free)] == [200] * 3
            assert (await post(server.alice)).status_code == 200

    asyncio.run(scenario())


@pytest.mark.parametrize("ends", ["disconnect", "broken pipe", "cancelled"])
def test_a_stream_holds_its_place_until_it_is_closed_half_way(make: Callable[..., _Server], ends: str) -> None:
    """However it ends, its place is there again at once, and only once: one more request is let in, not two."""

    async def scenario() -> None:
        gate = asyncio.Event()
        server = make(max_concurrency=1, gate=gate)
        gone, sent = asyncio.Event(), list[bytes]()
        messages = [{"type": "http.request", "body": json.dumps(_CHAT | {"stream": True}).encode()}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if gone.is_set():
                raise OSError("nobody listens")
            sent.append(message.get("body", b""))

        call = asyncio.create_task(server.app(_scope(server.alice), receive, send))
        await _until(lambda: b"Hello" in b"".join(sent))
        async with server.client() as client:

            async def status() -> int:
                answer = await client.get("/v1/models", headers=_bearer(server.alice))
                return answer.status_code

            assert await status() == 429  # the first bytes were sent, the last were not
            if ends == "cancelled":
                call.cancel()  # as Ray Serve does when its client goes away
            else:
                gone.set()
            if ends == "broken pipe":
                gate.set()
            await asyncio.wait({call}, timeout=10)
            assert call.done()
            assert call.cancelled() or call.exception() is None or ends == "broken pipe"
            assert await status() == 200
            gate.clear()
            second = asyncio.create_task(client.post("/v1/chat/completions", json=_CHAT, headers=_bearer(server.alice)))
            await _until(lambda: server.engine.running == 1)
            assert await status() == 429
            gate.set()
            assert (await second).status_code == 200

    asyncio.run(scenario())


def _scope(key: str) -> dict[str, Any]:
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "path": "/v1/chat/completions", "raw_path": b"/", "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [(b"content-type", b"application/json"), (b"authorization", f"Bearer {key}".encode())],
    }  # fmt: skip


@pytest.mark.parametrize("failure", [None, "the engine broke"])
def test_no_prompt_key_or_hash_is_logged_or_told(
    make: Callable[..., _Server],
    failure: str | None,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    server = make(requests_per_minute=3, models=["m"])
    server.engine.failure = failure
    answers = [
        server.chat(),
        server.chat(model="x"),
        server.chat(temperature=9),
        server.chat(),
        server.chat("wrong-key"),
    ]
    assert [answer.status_code for answer in answers] == [503 if failure else 200, 403, 400, 429, 401]
    told = [caplog.text, *capfd.readouterr(), *(answer.text + str(answer.headers) for answer in answers)]
    for secret in (_PROMPT, server.alice, server.bob, auth.fingerprint(server.alice), "wrong-key"):
        assert not [text for text in told if secret in text]


def test_a_websocket_is_closed_before_anything_looks_at_it(make: Callable[..., _Server]) -> None:
    sent: list[Any] = []

    async def knock(path: str) -> None:
        async def receive() -> Any:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await make().app({"type": "websocket", "path": path, "headers": [], "query_string": b""}, receive, send)

    asyncio.run(knock("/v1/chat/completions"))
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_every_key_is_compared_in_constant_time_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that stops at the first difference, or at the first match, tells by its time how far a guess was right."""
    compared: list[tuple[str, str]] = []

    def compare_digest(given: str, known: str) -> bool:
        compared.append((given, known))
        return given == known

    monkeypatch.setattr("rayswift.serving.auth.hmac.compare_digest", compare_digest)
    known = [auth.fingerprint(key) for key in ("first-key", "second-key", "third-key")]
    assert auth.matching("Bearer first-key", known) == 0
    assert auth.matching("Bearer no-key", known) is None
    given = [auth.fingerprint("first-key")] * 3 + [auth.fingerprint("no-key")] * 3
    assert compared == list(zip(given, known * 2, strict=True))


async def _until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)
