"""How the bodies of requests come in: of which type and size, how long they may take, and how many at a time.

Knows HTTP headers and ASGI messages; knows no route, and of a body's meaning only what can be media in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from math import inf

import numpy as np
from starlette.datastructures import Headers
from starlette.requests import Request as HttpRequest
from starlette.types import Receive

from rayswift.serving.api_errors import ApiError, gone, overloaded, too_large

BODY_TIMEOUT_S = 60.0
"""In which the whole body must have arrived: who sends a byte now and then holds a request of the server."""
HASTE_S = 0.5
"""The same where many are under way."""
MAX_SLOW = 64
"""Bodies that a replica waits for at the same time as long as that."""
_MAX_SIZES = 32  # of the largest body, together, of bodies that are under way
_BASE64 = bytes(sorted(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\\"))  # some write \/
_IS_OTHER = ~np.isin(np.arange(256), np.frombuffer(_BASE64, np.uint8))
_MIN_MEDIUM = 4096  # characters; nothing that takes time to parse goes on for so long without another one


class Arrivals:
    """The bodies that are under way to one process. Used from one event loop.

    Only `max_slow` of them may take BODY_TIMEOUT_S and the others HASTE_S, so that whoever opens requests and sends no
    bodies keeps neither places nor memory from those whose body comes at once. What has come of all may be as large as
    32 of the largest, and of those that may be slow as half of it: one that goes beyond has HASTE_S left.
    """

    def __init__(self, max_slow: int, max_bytes: int) -> None:
        self._max_slow, self._num = max_slow, 0
        self._bytes_left = _MAX_SIZES * max_bytes
        self._slow_bytes_left = self._bytes_left // 2

    async def read(self, receive: Receive, max_bytes: int, until: float = inf) -> bytes:
        """The whole body; `until` by the event loop's clock.

        Raises ApiError: 413 beyond `max_bytes`, 408 for one that is late, 429 for one that is while many others are
        under way, 499 when the client has gone.
        """
        body = bytearray()
        async with self._waiting(until) as one:
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise gone()
                part = message.get("body", b"")
                if len(body) + len(part) > max_bytes:
                    raise too_large(max_bytes)
                if not message.get("more_body", False):
                    return bytes(body + part) if body else part
                self._keep(one, len(part))
                body += part

    @asynccontextmanager
    async def _waiting(self, until: float) -> AsyncIterator[_Arrival]:
        is_slow = self._num < self._max_slow
        patience_s = BODY_TIMEOUT_S if is_slow else HASTE_S
        one = _Arrival(is_slow, asyncio.timeout_at(min(until, asyncio.get_running_loop().time() + patience_s)))
        self._num += 1
        try:
            async with one.timeout:
                yield one
        except TimeoutError:
            late = ApiError("the body did not arrive in time", status=408, code="request_timeout")
            raise (late if one.is_slow else overloaded(1)) from None
        finally:
            self._num -= 1
            self._bytes_left += one.num_bytes
            if one.is_slow:
                self._slow_bytes_left += one.num_bytes

    def _keep(self, one: _Arrival, num_bytes: int) -> None:
        """Count a part of a body. Raises ApiError (429) where there is no room for it."""
        if num_bytes > self._bytes_left:
            raise overloaded(1)
        if one.is_slow and num_bytes > self._slow_bytes_left:
            self._slow_bytes_left += one.num_bytes
            one.hasten()
        one.num_bytes += num_bytes
        self._bytes_left -= num_bytes
        if one.is_slow:
            self._slow_bytes_left -= num_bytes


@dataclass
class _Arrival:
    """A body that is under way: whether it may be slow, and how much of it has come."""

    is_slow: bool
    timeout: asyncio.Timeout
    num_bytes: int = 0

    def hasten(self) -> None:
        """Give it HASTE_S from now, or what it had left of its time."""
        self.is_slow = False
        soon = asyncio.get_running_loop().time() + HASTE_S
        self.timeout.reschedule(min(soon, self.timeout.when() or soon))


async def read_json(http: HttpRequest, arrivals: Arrivals, max_bytes: int, deadline: float) -> bytes:
    """The body of a JSON request. ApiError as `Arrivals.read`, and 415 for another type. What can be is told before."""
    media_type, _, options = http.headers.get("content-type", "").partition(";")
    if media_type.strip().lower() != "application/json":
        # Also what keeps web pages out: a browser asks before it sends JSON to another origin, and is not answered.
        raise _unsupported("Content-Type must be application/json")
    if "charset" in options.lower() and "utf-8" not in options.lower():
        raise _unsupported("the charset of the body must be utf-8")
    if http.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise _unsupported("the body must be sent without a Content-Encoding")  # a small one may unpack to gigabytes
    check_announced(http.headers, max_bytes)
    return await arrivals.read(http.receive, max_bytes, deadline)


def check_announced(headers: Headers, max_bytes: int) -> None:
    """Raises ApiError (413) for a body that says itself that it is too large."""
    announced = headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise too_large(max_bytes)


def check_besides_media(body: bytes, max_bytes: int) -> None:
    """Raises ApiError (413) for a body of more than `max_bytes` without what may be media in base64.

    To parse that as JSON takes no time; the same size in small objects would hold up everybody for seconds.
    """
    if len(body) <= max_bytes:
        return
    num_others = len(body.translate(None, _BASE64))  # first: what stands between them is then few
    if num_others <= max_bytes:
        others = np.flatnonzero(_IS_OTHER[np.frombuffer(body, np.uint8)])
        runs = np.diff(others, prepend=-1, append=len(body)) - 1
        num_others = len(body) - int(runs[runs >= _MIN_MEDIUM].sum())
    if num_others > max_bytes:
        raise too_large(max_bytes)


def _unsupported(message: str) -> ApiError:
    return ApiError(message, status=415, code="unsupported_media_type")
