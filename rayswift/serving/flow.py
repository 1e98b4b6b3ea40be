"""Running the answers of one request: all choices as one stream, under a deadline, for as long as somebody listens.

Knows asyncio, the engine protocol and how a disconnect arrives. Knows no route and no reply.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextvars import ContextVar
from math import inf
from typing import TypeVar

from starlette.requests import Request as HttpRequest

from rayswift.serving.api_errors import ApiError, gone
from rayswift.serving.engine import Delta, Engine, Request

T = TypeVar("T")
DEADLINE: ContextVar[float] = ContextVar("deadline", default=inf)
"""That of the request which a task works for. Work that is cancelled tells by it whether the client has ended it."""


def deadline_in(seconds: float) -> float:
    """The deadline of a request that begins now, by the clock of the event loop; its tasks have it in DEADLINE."""
    deadline = asyncio.get_running_loop().time() + seconds
    DEADLINE.set(deadline)
    return deadline


def took_too_long() -> ApiError:
    """The 503 for an answer that this server's own deadline has ended."""
    message = "the answer took longer than this server allows"
    return ApiError(message, status=503, code="timeout", headers={"Retry-After": "1"})


def choice_deltas(
    engine: Engine, requests: Sequence[Request], deadline: float
) -> AsyncGenerator[tuple[int, Delta], None]:
    """(choice, delta) of all choices as they come. Closing it stops every answer."""
    if len(requests) == 1:
        return _alone(engine.generate(requests[0]), deadline)
    return _together(engine, requests, deadline)


async def _alone(deltas: AsyncGenerator[Delta, None], deadline: float) -> AsyncGenerator[tuple[int, Delta], None]:
    """One answer, asked for as it is wanted: an engine gives a slow reader fewer, larger deltas."""
    try:
        while True:
            try:
                delta = await before(deadline, anext(deltas))
            except StopAsyncIteration:
                return
            yield 0, delta
    finally:
        await deltas.aclose()


async def _together(
    engine: Engine, requests: Sequence[Request], deadline: float
) -> AsyncGenerator[tuple[int, Delta], None]:
    queue: asyncio.Queue[tuple[int, Delta] | BaseException | None] = asyncio.Queue()
    tasks: list[asyncio.Task[None]] = []
    try:
        for index, request in enumerate(requests):
            tasks.append(asyncio.create_task(_pump(index, engine, request, queue)))
        running = len(tasks)
        while running:
            item = await before(deadline, queue.get())
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    index: int, engine: Engine, request: Request, queue: asyncio.Queue[tuple[int, Delta] | BaseException | None]
) -> None:
    """Moves one answer into the queue, then None, or what went wrong."""
    deltas = engine.generate(request)
    try:
        async for delta in deltas:
            queue.put_nowait((index, delta))
        queue.put_nowait(None)
    except Exception as error:  # carried to the request's own task, which answers for it
        queue.put_nowait(error)
    finally:
        await deltas.aclose()


async def before(deadline: float, awaitable: Awaitable[T]) -> T:
    """The result, given up at the deadline of the event loop's clock. Raises ApiError (503) then."""
    try:
        async with asyncio.timeout_at(deadline):
            return await awaitable
    except TimeoutError:
        raise took_too_long() from None


async def unless_gone(http: HttpRequest, awaitable: Awaitable[T]) -> T:
    """The result, given up as soon as the client closes the connection: nobody would read it."""
    work = asyncio.ensure_future(awaitable)
    leaving = asyncio.create_task(_disconnected(http))
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise gone()
        return work.result()
    finally:
        for task in (work, leaving):
            task.cancel()
        await asyncio.gather(work, leaving, return_exceptions=True)


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
