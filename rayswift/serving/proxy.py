"""What stands in Ray Serve's HTTP proxy, before every replica: what a replica could not finish ends in words.

Serve's proxy just closes the connection when a replica dies within an answer, and answers 500 when it dies before one;
what it refuses itself is plain text. It takes in all that a client sends, before a replica has looked at the key: what
is too large or too slow is refused here, and holds no replica's place. Knows ASGI; knows nothing of requests, models or
keys.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import sys
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayswift.serving import bodies, flow, replies
from rayswift.serving.api_errors import ApiError

_HOOK, _MAX_BYTES = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "RAYSWIFT_PROXY_MAX_BODY_BYTES"
# Headers by which a client would set Serve's timeout, have it go on when the client has gone, or choose a replica.
_NOT_FOR_CLIENTS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve-multiplexed-model-id")
_IDS = (b"x-request-id", b"x-session-id")  # Serve stops at one that is not UTF-8
_USUAL_MAX_BYTES = 18 * 2**20
"""What a ServeSpec with its usual bounds needs, media in base64 included: where Serve was started by other means."""
_OWN_PATHS = frozenset({"/-/healthz", "/-/routes"})  # the proxy's own pages for load balancers
_MAX_SLOW = 256
_LOOK_EVERY_S = 1.0
_CLOSED = frozenset({7, 8}) if sys.platform == "linux" else frozenset()  # TCP_CLOSE and TCP_CLOSE_WAIT in its headers


def environment(max_body_bytes: int) -> dict[str, str]:
    """The variables that make Serve's proxy call `middlewares` when it starts, if Serve is started with them."""
    return {_HOOK: f"{__name__}.{middlewares.__name__}", _MAX_BYTES: str(max_body_bytes)}


def middlewares() -> list[Middleware]:
    """What Serve's proxy wraps itself in."""
    return [Middleware(InWords, max_body_bytes=int(os.environ.get(_MAX_BYTES) or _USUAL_MAX_BYTES))]


class InWords:
    """ASGI middleware: a stream that stops without an end gets an error event, any other failure an OpenAI body.

    An answer whose length was told cannot be mended: its connection is closed, which clients notice. A request goes on
    when its body is there: one of more than `max_body_bytes` is 413, a late one 408, or 429 while many are under way.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app, self._max_body_bytes = app, max_body_bytes
        self._arrivals = bodies.Arrivals(_MAX_SLOW, max_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _OWN_PATHS:
            await self._app(scope, receive, send)
            return
        reply = _Sent(send)
        try:
            bodies.check_announced(Headers(scope=scope), self._max_body_bytes)
            body = await self._arrivals.read(receive, self._max_body_bytes)
        except ApiError as error:
            await reply.finish(error)
            return
        headers = [(name, value) for name, value in scope["headers"] if _is_for_us(name, value)]
        await self._app({**scope, "headers": headers}, _Body(receive, body).receive, reply.send)
        await reply.finish(None)


def _is_for_us(name: bytes, value: bytes) -> bool:
    """Whether a client may send a header; Serve takes `-` and `_` in a name as the same."""
    known = name.lower().replace(b"_", b"-")
    return known not in _NOT_FOR_CLIENTS and (known not in _IDS or re.fullmatch(rb"[!-~]{1,128}", value) is not None)


class _Body:
    """One request's body, which is there, and afterwards the word that its client has gone."""

    def __init__(self, receive: Receive, content: bytes) -> None:
        self._receive: Receive = receive
        self._content: bytes | None = content

    async def receive(self) -> Message:
        """The next message."""
        if self._content is not None:
            content, self._content = self._content, None
            return {"type": "http.request", "body": content, "more_body": False}
        receiving = asyncio.ensure_future(self._receive())
        try:
            while not (await asyncio.wait({receiving}, timeout=_LOOK_EVERY_S))[0]:
                if _has_left(self._receive):
                    return {"type": "http.disconnect"}
            return receiving.result()
        finally:
            receiving.cancel()


def _has_left(receive: Receive) -> bool:
    """Whether the client has closed its connection, seen at the connection itself; False where it cannot be seen.

    The HTTP server tells only the last request of a connection that it is lost, and reads no further while one waits
    behind another. To read on would let a client fill the memory; so who leaves more behind than the kernel takes in is
    not noticed before the request's deadline. (uvicorn 0.54)
    """
    transport = getattr(getattr(receive, "__self__", None), "transport", None)
    if transport is None:
        return False
    if transport.is_closing():
        return True
    if _CLOSED:
        with (
            suppress(OSError, AttributeError),
            socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as connection,
        ):
            return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in _CLOSED
    return False


class _Sent:
    """One reply on its way, and how far it got."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._status: int | None = None
        self._is_stream = self._is_replaced = self._has_ended = False

    async def send(self, message: Message) -> None:
        """Pass a message on, unless it is of a failure that Serve words itself."""
        if message["type"] == "http.response.start":
            kind = dict(message.get("headers", ())).get(b"content-type", b"")
            self._status, self._is_stream = message["status"], kind.startswith(b"text/event-stream")
            self._is_replaced = message["status"] >= 400 and not kind.startswith(b"application/json")
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._has_ended = not self._is_replaced
        if not self._is_replaced:
            await self._send(message)

    async def finish(self, reason: ApiError | None) -> None:
        """Say what is missing, if anything is, and why if that is known. A client that has gone hears nothing of it."""
        if self._has_ended:
            return
        if self._status is None or self._is_replaced:
            await self._answer(reason or _error_of(self._status))
        elif self._is_stream:
            event = replies.event(_lost().body())
            await self._send({"type": "http.response.body", "body": event, "more_body": False})

    async def _answer(self, error: ApiError) -> None:
        body = json.dumps(error.body()).encode()
        named = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
        headers = [(name.lower().encode(), value.encode()) for name, value in named.items()]
        await self._send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def _lost() -> ApiError:
    return ApiError("the replica that answered has ended; ask again", status=503, headers={"Retry-After": "1"})


def _error_of(status: int | None) -> ApiError:
    """What to say in the place of Serve's own words, by their status; None when there were none."""
    if status is None or status == 500:
        return _lost()
    if status == 404:
        # What is served answers all paths, and says 404 itself.
        message = "nothing is served at this path now: the endpoint is starting or stopping, or has another prefix"
        return ApiError(message, status=503, headers={"Retry-After": "1"})
    if status == 408:
        return flow.took_too_long()
    message = "the server is at its limit, or not ready yet; try again shortly"
    return ApiError(message, status=503, headers={"Retry-After": "1"})
