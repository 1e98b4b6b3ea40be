"""Streams that say they are alive: silence with signs of life is waited for, silence without them is not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from rayswift.errors import ServeError
from rayswift.serving import beats


class _Source:
    """Three items, the second of which waits for `gate`; knows whether it was closed."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.gate, self.failure, self.is_closed = asyncio.Event(), failure, False

    async def items(self) -> AsyncGenerator[int, None]:
        try:
            yield 1
            await self.gate.wait()
            if self.failure is not None:
                raise self.failure
            yield 2
            yield 3
        finally:
            self.is_closed = True


def test_a_silent_stream_says_that_it_is_alive_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beats, "BEAT_S", 0.01)

    async def scenario() -> None:
        source, found = _Source(), list[int | None]()
        async for item in beats.with_beats(source.items()):
            found.append(item)
            if found.count(None) == 4:  # the first and three in the silence
                source.gate.set()
        assert (found[:2], found[-2:]) == ([None, 1], [2, 3])
        assert found.count(None) >= 4
        assert source.is_closed

    asyncio.run(scenario())


@pytest.mark.parametrize("cancelled", [False, True])
def test_who_leaves_a_silent_stream_closes_it(monkeypatch: pytest.MonkeyPatch, cancelled: bool) -> None:
    monkeypatch.setattr(beats, "BEAT_S", 0.01)

    async def scenario() -> None:
        source = _Source()
        beating = beats.with_beats(source.items())
        assert [await anext(beating) for _ in range(3)] == [None, 1, None]
        if cancelled:
            monkeypatch.setattr(beats, "BEAT_S", 100)
            waiting = asyncio.ensure_future(anext(beating))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        await beating.aclose()
        assert source.is_closed

    asyncio.run(scenario())


def test_what_the_items_raise_is_raised() -> None:
    async def scenario() -> None:
        source = _Source(failure=ServeError("out of cache"))
        source.gate.set()
        with pytest.raises(ServeError, match="out of cache"):
            _ = [item async for item in beats.with_beats(source.items())]
        assert source.is_closed

    asyncio.run(scenario())


def test_a_stream_that_says_nothing_is_lost_and_one_that_ends_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beats, "SILENT_S", 0.05)

    async def scenario() -> None:
        source = _Source()
        listener = beats.Listener(source.items())
        assert await listener.next() == 1
        await asyncio.sleep(3 * beats.SILENT_S)  # who is read too slowly is not silent
        with pytest.raises(ServeError, match=r"lost with its replica, of which nothing was heard for 0\.05 s"):
            await listener.next()
        with pytest.raises(StopAsyncIteration):
            await listener.next()
        listener.close()

        async def late() -> AsyncGenerator[int, None]:
            raise TimeoutError("of its own")
            yield 1

        with pytest.raises(TimeoutError, match="of its own"):
            await beats.Listener(late()).next()

        other = beats.Listener(_Source().items())
        assert await other.next() == 1
        leaving = asyncio.ensure_future(other.next())
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        other.close()

    asyncio.run(scenario())
