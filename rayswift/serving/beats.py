"""Signs of life in a stream from another process, by which one that is silent is told from one that has gone.

A machine that vanishes says nothing, and gRPC asks it after five minutes (RAY_grpc_client_keepalive_time_ms). It cannot
ask sooner: Serve's replicas (2.60) allow no more, and asked every 10 s they end a connection whose stream is silent
("too_many_pings", after 80 s). So the stream itself says that it is alive. Knows asyncio; knows no transport.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, TypeVar

from rayswift.errors import ServeError

T = TypeVar("T")
BEAT_S, SILENT_S = 5.0, 30.0
"""Without an item for so long a sign of life is sent; without either, a stream is lost. A busy loop may be late."""
_END = object()


async def with_beats(items: AsyncGenerator[T, None]) -> AsyncGenerator[T | None, None]:
    """The items, behind a None that says at once that they were asked for, and one more whenever none came for BEAT_S.

    Closing it closes the items.
    """
    coming: asyncio.Future[Any] | None = None
    try:
        yield None
        while True:
            coming = asyncio.ensure_future(anext(items, _END))
            while not (await asyncio.wait((coming,), timeout=BEAT_S))[0]:
                yield None
            if (item := coming.result()) is _END:
                return
            yield item
    finally:
        if coming is not None:
            coming.cancel()  # nothing to one that is done
            await asyncio.gather(coming, return_exceptions=True)
        await items.aclose()


async def heard(stream: Any) -> Any:
    """The next item of a stream of `with_beats`, signs of life among them. Raises ServeError once there are none."""
    try:
        async with asyncio.timeout(SILENT_S) as patience:
            return await anext(stream)
    except TimeoutError:
        if not patience.expired():
            raise
        raise ServeError(f"was lost with its replica, of which nothing was heard for {SILENT_S:g} s") from None
