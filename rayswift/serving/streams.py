"""How answers leave while they are generated: gathered whole, or as server-sent events, with errors told on the way.

Knows Starlette's streaming response and how answers are written; knows no route and no request.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from rayswift.errors import ServeError
from rayswift.serving import gate, replies
from rayswift.serving.admission import Places
from rayswift.serving.api_errors import ApiError
from rayswift.serving.engine import Delta, Refused
from rayswift.serving.replies import Answer, Reply


async def collect(deltas: AsyncGenerator[tuple[int, Delta], None], answers: Sequence[Answer]) -> None:
    """All that is generated, gathered into the answers."""
    try:
        async for index, delta in deltas:
            answers[index].add(delta)
    finally:
        await deltas.aclose()


async def events(
    deltas: AsyncGenerator[tuple[int, Delta], None],
    answers: Sequence[Answer],
    reply: Reply,
    usage_tokens: int | None,
) -> AsyncGenerator[bytes, None]:
    """The stream as server-sent events. An error after the first one becomes an error event, as in OpenAI's API.

    What ends the stream goes out together with the last delta: each piece by itself costs a system call on every side.
    """
    opened, num_open = set[int](), len(answers)
    try:
        async for index, delta in deltas:
            answer = answers[index]
            answer.add(delta)
            if not delta.text and delta.finish_reason is None and not delta.logprobs:
                continue
            parts = [] if index in opened else [reply.opening(index)]
            parts.append(reply.chunk(answer, delta))
            opened.add(index)
            num_open -= delta.finish_reason is not None
            if not num_open and usage_tokens is not None:
                parts.append(reply.closing(replies.usage(answers, usage_tokens)))
            end = b"" if num_open else replies.DONE
            if written := b"".join(replies.event(part) for part in parts if part is not None) + end:
                yield written
    except Exception as error:
        if not opened:
            raise
        yield replies.event(told(error).body())
    finally:
        await deltas.aclose()


def told(error: Exception) -> ApiError:
    """What a client is told of an error: its own text where it was meant for clients, else a bare 500 or 503."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Refused):
        return ApiError(str(error), code="invalid_value")
    if isinstance(error, ServeError):
        gate.internal_error(error)
        return ApiError("the model could not finish this answer", status=503, headers={"Retry-After": "1"})
    return gate.internal_error(error)


class EventStream(StreamingResponse):
    """A stream of events whose first one is known. Closes its source and frees its places however sending ends."""

    def __init__(
        self, first: bytes, rest: AsyncGenerator[bytes, None], places: Places, headers: Mapping[str, str]
    ) -> None:
        kept = {"Cache-Control": "no-store", **headers}
        super().__init__(_chain(first, rest), media_type="text/event-stream", headers=kept)
        self._source, self._places = rest, places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._places:
            try:
                await super().__call__(scope, receive, send)
            finally:
                await self._source.aclose()


async def _chain(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    yield first
    async for event in rest:
        yield event
