"""Signs of life in a stream from another process, by which one that is silent is told from one that has gone.

A machine that vanishes says nothing, and gRPC asks it after five minutes (RAY_grpc_client_keepalive_time_ms). It cannot
ask sooner: Serve's replicas (2.60) allow no more, and asked every 10 s they end a connection whose stream is silent
("too_many_pings", after 80 s). So the stream itself says that it is alive. Knows asyncio; knows no transport.

Every token passes here, so there is one timer for a stream and none for an item.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any, Generic, TypeVar

from rayswift.errors import ServeError

T = TypeVar("T")
BEAT_S, SILENT_S = 5.0, 30.0
"""Without an item for so long, or up to twice that, a sign of life is sent; without either for so long, a stream is
lost. A busy loop may be late."""


async def with_beats(items: AsyncGenerator[T, None]) -> AsyncGenerator[T | None, None]:
    """The items, behind a None that says at once that they were asked for, and one more whenever none came for BEAT_S.

    Closing it closes the items.
    """
    box = _Box(items)
    try:
        yield None
        while await box.filled():
            while box.items:
                yield box.items.popleft()
    finally:
        await box.close()


class _Box(Generic[T]):
    """What a stream has brought and nobody has taken yet, and a None for each time of silence."""

    def __init__(self, source: AsyncGenerator[T, None]) -> None:
        self.items: deque[T | None] = deque()
        self._source, self._filled, self._is_silent = source, asyncio.Event(), True
        self._loop = asyncio.get_running_loop()
        self._filling = self._loop.create_task(self._fill())
        self._timer = self._loop.call_later(BEAT_S, self._beat)

    async def _fill(self) -> None:
        try:
            async for item in self._source:
                self.items.append(item)
                self._is_silent = False
                self._filled.set()
        finally:
            self._filled.set()

    def _beat(self) -> None:
        if self._is_silent:
            self.items.append(None)
            self._filled.set()
        self._is_silent = True
        self._timer = self._loop.call_later(BEAT_S, self._beat)

    async def filled(self) -> bool:
        """Whether there is anything, once there is or nothing will come. Raises what the stream raised at its end."""
        await self._filled.wait()
        self._filled.clear()
        if not self.items and self._filling.done():
            await self._filling
            return False
        if self._filling.done():
            self._filled.set()  # the end is still to be told
        return True

    async def close(self) -> None:
        self._timer.cancel()
        self._filling.cancel()  # nothing to one that is done
        await asyncio.gather(self._filling, return_exceptions=True)
        await self._source.aclose()


class Listener:
    """Hears a stream of `with_beats`, for one task at a time."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._is_lost = stream, False
        self._waiting: asyncio.Task[Any] | None = None
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()
        self._timer = self._loop.call_later(SILENT_S, self._look)

    async def next(self) -> Any:
        """The next item, signs of life among them. Raises ServeError once there are none, else as the stream does."""
        task = asyncio.current_task()
        assert task is not None
        self._waiting, self._since = task, self._loop.time()
        cancelling = task.cancelling()
        try:
            return await anext(self._stream)
        except asyncio.CancelledError:
            if not self._is_lost or task.uncancel() > cancelling:
                raise  # somebody else has ended this task
            raise ServeError(f"was lost with its replica, of which nothing was heard for {SILENT_S:g} s") from None
        finally:
            self._waiting = None

    def _look(self) -> None:
        """Ends the waiting that lasts too long; as `asyncio.timeout` does, which needs a timer for each item."""
        if self._waiting is None:
            left_s = SILENT_S
        elif (left_s := self._since + SILENT_S - self._loop.time()) <= 0:
            self._is_lost = True
            self._waiting.cancel()
            return
        self._timer = self._loop.call_later(left_s, self._look)

    def close(self) -> None:
        """Look no more; the stream is not touched."""
        self._timer.cancel()
