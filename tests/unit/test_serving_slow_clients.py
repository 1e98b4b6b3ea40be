"""Clients that send no bodies, and clients that leave behind a second request, over real HTTP: others are answered."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
import uvicorn

from rayswift.serving import bodies, proxy
from rayswift.serving.api_errors import ApiError
from rayswift.serving.http import build_asgi
from rayswift.serving.spec import ServeSpec
from tests.promotion_cases import until

_HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
_SLOW = f"{_HEAD}Content-Length: 100\r\n\r\n{{".encode()
_MAX_SLOW = 4


class _Listening:
    """An ASGI app behind uvicorn in a thread, as Ray Serve's proxy and its replicas listen."""

    def __init__(self, app: Any, loop: str) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self._socket.getsockname()[1]
        config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None, loop=loop)
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: self._uvicorn.run([self._socket]), daemon=True)
        self._thread.start()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, float]:
        """(status, seconds)."""
        begin = time.monotonic()
        connection = http.client.HTTPConnection("localhost", self.port, timeout=10)
        with closing(connection):
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            return response.status, time.monotonic() - begin

    def close(self) -> None:
        self._uvicorn.should_exit = True
        self._thread.join(10)


@pytest.fixture(params=["asyncio", "uvloop"])
def listening(request: pytest.FixtureRequest) -> Iterator[Callable[[Any], _Listening]]:
    with ExitStack() as stack:

        def started(app: Any) -> _Listening:
            made = _Listening(app, request.param)
            stack.callback(made.close)
            return made

        yield started


class _Places:
    """An app with few places, as a replica has them: who finds none waits. Reads what it is sent."""

    def __init__(self, num: int) -> None:
        self._free, self.num_seen, self.num_left = asyncio.Semaphore(num), 0, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with self._free:
            self.num_seen += 1
            while (message := await receive())["type"] == "http.request" and message["more_body"]:
                pass
            if scope["path"] == "/stay":
                while message["type"] != "http.disconnect":
                    message = await receive()
                self.num_left += 1
                return
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def test_who_sends_no_bodies_holds_no_place_behind_the_proxy(listening: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "_MAX_SLOW", _MAX_SLOW)
    places = _Places(2)
    server = listening(proxy.InWords(places, 1000))
    with ExitStack() as held:
        connections = [held.enter_context(closing(server.connect())) for _ in range(100)]
        for connection in connections:
            connection.sendall(_SLOW)
        for ask in (("GET", "/health"), ("POST", "/v1/completions", b"{}")):
            status, took = server.ask(*ask)
            assert status == 200
            assert took < 1
        assert places.num_seen == 2
        refused = [_reply(connection) for connection in connections[_MAX_SLOW:]]
        assert {status for status, _, _ in refused} == {429}
        assert {code for _, code, _ in refused} == {"rate_limit_exceeded"}
        assert {retry for _, _, retry in refused} == {"1"}
        late = connections[0]
        late.sendall(b"x" * 99)
        assert http.client.HTTPResponse(late).begin() is None, "the first ones may take their time"


def _reply(connection: socket.socket) -> tuple[int, str, str | None]:
    """(status, code, Retry-After)."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, json.loads(response.read())["error"]["code"], response.getheader("Retry-After")


def test_a_replica_that_is_asked_without_a_proxy_waits_for_few_bodies(listening: Any) -> None:
    app = build_asgi(ServeSpec(models={"m": "unused"}), {})
    server = listening(app)
    with ExitStack() as held:
        connections = [held.enter_context(closing(server.connect())) for _ in range(bodies.MAX_SLOW + 50)]
        for connection in connections:
            connection.sendall(_SLOW)
        answers = [_reply(connection) for connection in connections[bodies.MAX_SLOW :]]
        assert {status for status, _, _ in answers} == {429}
        status, took = server.ask("POST", "/v1/completions", b'{"model": "m", "prompt": "a"}')
        assert status == 404, "a body that comes at once is read"
        assert took < 1


def test_bodies_under_way_are_32_of_the_largest_together() -> None:
    async def ask() -> None:
        arrivals = bodies.Arrivals(1000, 10)
        part = {"type": "http.request", "body": b"x" * 10, "more_body": True}
        whole = asyncio.Event()
        first = [asyncio.create_task(arrivals.read(_pieces(whole, part), 10)) for _ in range(32)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as caught:
            await arrivals.read(_pieces(whole, part), 10)
        assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "1"})
        at_once = {"type": "http.request", "body": b"y" * 10, "more_body": False}
        assert await arrivals.read(_pieces(whole, at_once), 10) == b"y" * 10
        whole.set()
        assert await asyncio.gather(*first) == [b"x" * 10] * 32
        assert await arrivals.read(_pieces(whole, part), 10) == b"x" * 10

    asyncio.run(ask())


def test_slow_bodies_leave_half_of_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few they are: the first sixteen of the largest may take their time, and others are soon ended."""
    monkeypatch.setattr(bodies, "HASTE_S", 0.05)

    async def ask() -> None:
        arrivals = bodies.Arrivals(1000, 10)
        part = {"type": "http.request", "body": b"x" * 10, "more_body": True}
        whole = asyncio.Event()
        held = [asyncio.create_task(arrivals.read(_pieces(whole, part), 10)) for _ in range(32)]
        ended = await asyncio.wait_for(asyncio.gather(*held[16:], return_exceptions=True), 20)
        assert {(error.status, error.code) for error in ended if isinstance(error, ApiError)} == {
            (429, "rate_limit_exceeded")
        }
        assert not any(task.done() for task in held[:16])
        at_once = {"type": "http.request", "body": b"", "more_body": False}
        for _ in range(50):  # what was counted of the others is given back
            assert await arrivals.read(_pieces(whole, part, at_once), 10) == b"x" * 10
        held[0].cancel()
        await asyncio.wait(held[:1])
        slow = asyncio.create_task(arrivals.read(_pieces(whole, part), 10))  # takes the place of one that has gone
        with pytest.raises(ApiError, match="limit of waiting requests"):
            await asyncio.wait_for(arrivals.read(_pieces(whole, part), 10), 20)
        whole.set()
        assert await asyncio.gather(*held[1:16], slow) == [b"x" * 10] * 16

    asyncio.run(ask())


def _pieces(whole: asyncio.Event, *parts: Any) -> Any:
    left = iter(parts)

    async def receive() -> Any:
        if (part := next(left, None)) is not None:
            return part
        await whole.wait()
        return {"type": "http.request", "body": b"", "more_body": False}

    return receive


@pytest.mark.parametrize(
    "behind", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", _SLOW, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 2000],
    ids=["nothing", "a request", "half a request", "2000 requests"],
)  # fmt: skip
@pytest.mark.skipif(not proxy._CLOSED, reason="only Linux tells of a connection whose data lies unread")
def test_who_leaves_behind_a_second_request_is_noticed(
    listening: Any, behind: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, has_left = list[bool](), proxy._has_left

    def look(receive: Any) -> bool:
        looks.append(has_left(receive))
        return looks[-1]

    monkeypatch.setattr(proxy, "_has_left", look)
    monkeypatch.setattr(proxy, "_LOOK_EVERY_S", 0.1)
    places = _Places(2)
    server = listening(proxy.InWords(places, 1000))
    with closing(server.connect()) as connection:
        connection.sendall(b"GET /stay HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: places.num_seen == 1, "the request is seen", 30)
        connection.setblocking(False)
        _send_what_fits(connection, behind)
        until(lambda: len(looks) >= 3, "the connection is looked at", 30)
        assert places.num_left == 0, "who stays is not taken for gone"
    until(lambda: places.num_left == 1, "the request is given up", 30)


def _send_what_fits(connection: socket.socket, content: bytes) -> None:
    try:
        while content:
            content = content[connection.send(content) :]
    except BlockingIOError:
        return


def test_a_slow_body_over_its_time_is_told(monkeypatch: pytest.MonkeyPatch, listening: Any) -> None:
    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.2)
    server = listening(proxy.InWords(_Places(1), 1000))
    with closing(server.connect()) as connection:
        connection.sendall(_SLOW)
        assert _reply(connection)[:2] == (408, "request_timeout")
