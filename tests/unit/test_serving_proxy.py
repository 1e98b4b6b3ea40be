"""What Serve's proxy leaves unsaid is said: a stream that was cut off, an answer that never began, plain text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from rayswift.serving import proxy
from rayswift.serving.spec import ServeSpec

_SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]
_JSON = [(b"content-type", b"application/json")]
_PLAIN = [(b"content-type", b"text/plain")]


def _start(status: int, headers: Any) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": headers}


def _body(content: bytes, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": more}


def _sent(messages: Sequence[dict[str, Any]], path: str = "/v1/completions") -> list[Any]:
    """What a client gets when the proxy sends these."""
    found: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    async def send(message: Any) -> None:
        found.append(message)

    [middleware] = proxy.middlewares()
    made = middleware.cls(app, *middleware.args, **middleware.kwargs)
    asyncio.run(made({"type": "http", "path": path, "headers": []}, _no_body, send))
    return found


async def _no_body() -> Any:
    return {"type": "http.request", "body": b"", "more_body": False}


def test_what_is_whole_passes_as_it_is() -> None:
    for reply in (
        [_start(200, _SSE), _body(b"data: 1\n\n", True), _body(b"", False)],
        [_start(200, _JSON), _body(b"{}", False)],
        [_start(429, _JSON), _body(b'{"error": {}}', False)],
    ):
        assert _sent(reply) == reply
    own = [_start(500, _PLAIN), _body(b"unhealthy", False)]
    for path in ("/-/healthz", "/-/routes"):
        assert _sent(own, path) == own


def test_a_stream_that_is_cut_off_ends_with_an_error_event() -> None:
    *begun, last = _sent([_start(200, _SSE), _body(b"data: 1\n\n", True)])
    assert begun == [_start(200, _SSE), _body(b"data: 1\n\n", True)]
    assert last["more_body"] is False
    assert last["body"].startswith(b"data: ")
    error = json.loads(last["body"][6:])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "server_error"


def test_headers_for_serve_itself_are_not_for_clients() -> None:
    sent = [
        (b"authorization", b"Bearer x"), (b"x-request-id", b"a1-b2"), (b"x-session-id", b"s"),
        (b"x-request-timeout-seconds", b"0"), (b"X-Request-Timeout-Seconds", b"9"), (b"x_request_id", b"\xff"),
        (b"x-request-disconnect-disabled", b"?1"), (b"serve_multiplexed_model_id", b"m"), (b"x-request-id", b"\xff"),
        (b"x-request-id", b"a\nb"), (b"x-session-id", b"s" * 129), (b"serve-multiplexed-model-id", b"\xff"),
    ]  # fmt: skip
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(scope["headers"])
        await send(_start(200, _JSON))
        await send(_body(b"{}", False))

    async def send(_: Any) -> None:
        return None

    made = proxy.InWords(app, max_body_bytes=1000)
    asyncio.run(made({"type": "http", "path": "/", "headers": sent}, _no_body, send))
    assert seen == sent[:3]


def test_a_serve_started_by_other_means_takes_in_what_a_spec_usually_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYSWIFT_PROXY_MAX_BODY_BYTES", raising=False)
    [middleware] = proxy.middlewares()
    usual = ServeSpec(models={"m": "unused"})
    assert middleware.kwargs["max_body_bytes"] == usual.max_body_bytes + 2 * usual.max_media_bytes


@pytest.mark.parametrize("path", ["/", "/-/x", "/-/healthz/x"])
def test_no_more_of_a_body_is_taken_in_than_there_may_be(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    variables = proxy.environment(2500)
    assert "rayswift.serving.proxy.middlewares" in variables.values()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    [middleware] = proxy.middlewares()
    taken, seen, found = list[Any](), list[Any](), list[Any]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(await receive())
        await send(_start(200, _JSON))
        await send(_body(b"{}", False))

    async def send(message: Any) -> None:
        found.append(message)

    async def ask(num_pieces: int, headers: Any = ()) -> Any:
        pieces = iter([{"type": "http.request", "body": b"x" * 1000, "more_body": True}] * num_pieces)
        for one in (taken, seen, found):
            one.clear()

        async def receive() -> Any:
            taken.append(next(pieces, {"type": "http.request", "body": b"", "more_body": False}))
            return taken[-1]

        made = middleware.cls(app, *middleware.args, **middleware.kwargs)
        await made({"type": "http", "path": path, "headers": headers}, receive, send)  # type: ignore[arg-type]
        return found[0]["status"], len(taken)

    assert asyncio.run(ask(2)) == (200, 3)
    assert seen == [{"type": "http.request", "body": b"x" * 2000, "more_body": False}]
    assert asyncio.run(ask(10**6)) == (413, 3)
    assert json.loads(found[1]["body"])["error"]["code"] == "request_too_large"
    assert not seen, "no replica has heard of it"
    assert asyncio.run(ask(2, [(b"content-length", b"2501")])) == (413, 0)


def test_an_answer_of_a_told_length_is_left_broken() -> None:
    cut = [_start(200, _JSON), _body(b"{", True)]
    assert _sent(cut) == cut


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ([], 503),
        ([_start(500, _PLAIN), _body(b"Traceback (most recent call last)", False)], 503),
        ([_start(503, _PLAIN), _body(b"Request dropped due to backpressure", False)], 503),
        ([_start(404, _PLAIN), _body(b"Path not found. Ping /-/routes", False)], 503),
        ([_start(408, _PLAIN), _body(b"Request 7f timed out", False)], 503),
    ],
)
def test_other_failures_are_openai_errors_that_tell_nothing(said: Any, status: int) -> None:
    start, body = _sent(said)
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    assert start["status"] == status
    assert headers["content-type"] == "application/json"
    assert int(headers["content-length"]) == len(body["body"])
    assert set(json.loads(body["body"])["error"]) == {"message", "type", "param", "code"}
    assert not said or said[1]["body"] not in body["body"]
    if status == 503:
        assert headers["retry-after"] == "1"
