"""An engine in another replica: the application that runs one version of a model, and what stands for it in a front.

Knows Ray Serve's handles and what of them fails how. Which version is asked, and how often, is known by the front.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from rayswift.errors import ServeError
from rayswift.serving import beats, replayed
from rayswift.serving.api_errors import ApiError, overloaded
from rayswift.serving.engine import Delta, Embedding, Request
from rayswift.serving.facts import Facts
from rayswift.serving.served import open_model
from rayswift.serving.spec import ServeSpec

if TYPE_CHECKING:
    from rayswift.data.media.encoder import MediaEncoder

_PING_TIMEOUT_S, _TAKEN_TIMEOUT_S = 20.0, 10.0
_RETRY_AFTER_S = 2
"""What clients of a full version are told to wait, where Serve does not say it."""
_LOST = (RayError, RayServeException, grpc.RpcError, StopAsyncIteration)
"""What a stream raises that its replica did not: the last where it ended without an end of the answer."""
_log = logging.getLogger("rayswift.serving")


class VersionReplica:
    """One replica of one version: a started engine that fronts ask."""

    async def __init__(self, spec: ServeSpec, folder: str) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        self._model = await open_model(spec, folder)
        gc.freeze()

    async def facts(self) -> Facts:
        """What a front has to know of the engine."""
        engine = self._model.engine
        return Facts(
            engine.max_model_len, engine.media_encoder is not None, engine.can_constrain, engine.embedding,
            self._model.prompts.chat_takes,
        )  # fmt: skip

    async def generate(self, request: Request) -> AsyncGenerator[Delta | None, None]:
        """The deltas of one answer, behind a None that says at once that this replica has taken the request.

        Further ones say that it is there while the engine says nothing. Any error is a ServeError.
        """
        beating = beats.with_beats(self._model.engine.generate(request))
        try:
            with _by_name():
                async for delta in beating:
                    yield delta
        finally:
            await beating.aclose()

    async def embed(self, ids: Sequence[int], num_dims: int | None) -> AsyncGenerator[np.ndarray | None, None]:
        """The vector of a text, and None as in `generate`."""

        async def alone() -> AsyncGenerator[np.ndarray, None]:
            yield await self._model.engine.embed(ids, num_dims)

        beating = beats.with_beats(alone())
        try:
            with _by_name():
                async for vector in beating:
                    yield vector
        finally:
            await beating.aclose()

    async def answer(self, asked: list[dict[str, Any]] | str, max_new_tokens: int) -> str:
        """The greedy answer to a conversation of text, or what continues a text, its prompt made as for any client.

        Raises ServeError.
        """
        return await replayed.answer(self._model, asked, max_new_tokens)

    async def follows(self, asked: list[dict[str, Any]] | str, said: str) -> float:
        """The fraction of an answer's tokens that it would choose too, as `replayed.follows`. Raises ServeError."""
        return await replayed.follows(self._model, asked, said)

    async def vector(self, text: str) -> np.ndarray:
        """The vector of a text. Raises ServeError."""
        return await replayed.vector(self._model, text)

    async def check_health(self) -> None:
        """Raises when the engine cannot answer any more; Serve then replaces this replica."""
        self._model.engine.check()

    async def __del__(self) -> None:  # Ray Serve awaits it before it ends the replica
        await self._model.engine.close()


class RemoteEngine:
    """An `Engine` (see the protocol) whose answers come from the replicas behind a handle of `VersionReplica`.

    Where no replica takes a request it is down until a ping is answered; where all that answer are full it is not, and
    the request is told so: ApiError (429).
    """

    def __init__(self, handle: Any, spec: ServeSpec, folder: str) -> None:
        self._handle, self._spec, self._folder = handle, spec, folder
        self._facts: Facts | None = None
        self._media_encoder: MediaEncoder | None = None
        self._failure: str | None = None
        self._heard_at = -math.inf

    @property
    def max_model_len(self) -> int:
        return self._started().max_model_len

    @property
    def media_encoder(self) -> MediaEncoder | None:
        return self._media_encoder

    @property
    def can_constrain(self) -> bool:
        return self._started().can_constrain

    @property
    def embedding(self) -> Embedding | None:
        return self._started().embedding

    async def start(self) -> None:
        with _in_own_words():
            self._facts = await self._asked("facts", stream=False)
        if self._facts.takes_media:
            from rayswift.training.media import load_encoder

            self._media_encoder = await asyncio.to_thread(load_encoder, self._folder, self._spec.media)

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        deltas = self._asked("generate", request)
        ended = False
        try:
            await self._taken(deltas)
            with closing(beats.Listener(deltas)) as listener:
                while not ended:
                    delta = await self._next(listener)
                    ended = delta.finish_reason is not None
                    yield delta
        finally:
            if not ended:
                _cancel(deltas)

    def _asked(self, method: str, *arguments: Any, stream: bool = True) -> Any:
        """A call whose answers come over Serve's own connection: as a Ray object each costs twice the processor time.

        The replicas listen for it whether it is used or not. Plain pickle, since nothing of ours needs more.
        """
        call = self._handle.options(
            method_name=method, stream=stream, _by_reference=False,
            request_serialization="pickle", response_serialization="pickle",
        )  # fmt: skip
        return call.remote(*arguments)

    async def _taken(self, deltas: Any) -> None:
        """Returns when a replica has the request: while there is none, Serve would have it wait for one to start."""
        asked_at = time.monotonic()
        try:
            async with asyncio.timeout(_TAKEN_TIMEOUT_S):
                with _in_own_words():
                    await anext(deltas)
        except ApiError:
            raise  # full, which is not down
        except ServeError as error:
            self._failure = f"no replica of {self._folder} has taken a request: {error}"
            raise
        except TimeoutError:
            if self._heard_at > asked_at:  # others are being answered meanwhile
                raise overloaded(_RETRY_AFTER_S) from None
            self._failure = f"no replica of {self._folder} has taken a request within {_TAKEN_TIMEOUT_S:g} s"
            raise ServeError(self._failure) from None
        self._heard_at = time.monotonic()

    async def _next(self, listener: beats.Listener) -> Any:
        """What the replica sends beside signs of life. Raises ServeError when they stop, ApiError as it does."""
        item = None
        while item is None:
            with _in_own_words():
                item = await listener.next()
            self._heard_at = time.monotonic()
        return item

    async def embed(self, ids: Sequence[int], num_dims: int | None = None) -> np.ndarray:
        vectors = self._asked("embed", list(ids), num_dims)
        ended = False
        try:
            await self._taken(vectors)
            with closing(beats.Listener(vectors)) as listener:
                vector = np.asarray(await self._next(listener))
            ended = True
            return vector
        finally:
            if not ended:
                _cancel(vectors)

    def check(self) -> None:
        if self._failure is not None:
            raise ServeError(self._failure)

    async def ping(self) -> None:
        """Ask whether a replica answers; `check` tells. One that is too full to say so has not failed by that."""
        asked_at = time.monotonic()
        try:
            async with asyncio.timeout(_PING_TIMEOUT_S):
                with _in_own_words():
                    await self._asked("facts", stream=False)
        except ApiError:
            return
        except (ServeError, TimeoutError) as error:
            if isinstance(error, TimeoutError) and self._heard_at > asked_at:
                return
            self._failure = f"no replica of {self._folder} answers: {str(error) or f'not within {_PING_TIMEOUT_S:g} s'}"
            _log.warning(self._failure)
        else:
            self._failure = None

    async def close(self) -> None:
        """Nothing runs here; the replicas belong to their application."""

    def _started(self) -> Facts:
        if self._facts is None:
            raise ServeError("the engine was not started", fix="await start() first")
        return self._facts


def _cancel(stream: Any) -> None:
    """Free its place there. Of a stream that no replica has taken, Serve raises once more why."""
    with suppress(RayError, RayServeException):
        stream.cancel()
        # One that is taken, but has not been heard of here, Serve (2.60) does not cancel in a loop of its own.
        taken = stream._replica_result_future
        if taken.done() and not taken.cancelled() and taken.exception() is None:
            taken.result().cancel()


@contextmanager
def _by_name() -> Iterator[None]:
    """Makes what only this process may know how to build an error of its name: Serve takes down what it cannot pickle.

    To the other side that looks as if this process had ended. Serve writes the whole error into the replica's log.
    """
    try:
        yield
    except ServeError:
        raise
    except Exception as error:
        raise ServeError(f"failed inside its replica: {type(error).__name__}") from error


@contextmanager
def _in_own_words() -> Iterator[None]:
    """Errors of a replica as it raised them, full queues as ApiError (429), all others as ServeError.

    A replica that is ended in the middle of a stream sends that it was cancelled, which here would look as if the
    client's own task had been.
    """
    try:
        yield
    except BackPressureError as error:
        raise overloaded(math.ceil(error.retry_after_s or _RETRY_AFTER_S)) from error
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, ServeError) else None
        raise cause or ServeError(f"failed inside its replica: {type(error.cause or error).__name__}") from error
    except ServeError:
        raise
    except _LOST as error:
        raise ServeError(f"was lost with its replica: {type(error).__name__}") from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise ServeError("was lost with its replica, which was ended") from error
    except Exception as error:
        raise ServeError(f"failed inside its replica: {type(error).__name__}") from error
