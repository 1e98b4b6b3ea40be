"""Which version answers the next request, and how each is doing: weights and counted answers of several versions.

Knows the engine protocol and one event loop. Where the weights come from and who looks at the counts is not known here.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from rayswift.errors import ServeError
from rayswift.serving.api_errors import ApiError, unknown_version
from rayswift.serving.engine import Delta, Embedding, Engine, Refused, Request
from rayswift.serving.flow import DEADLINE
from rayswift.serving.routing import WeightedPick
from rayswift.serving.served import ServedModel
from rayswift.serving.tallies import Tally, counted

if TYPE_CHECKING:
    from rayswift.data.media.encoder import MediaEncoder

_LATE_S = 30.0
"""What lies between the choice of a version and the beginning of an answer at most: its prompt is made."""
_EARLY_S = 0.002
"""How much too soon an event loop may end what waits: uvloop counts in milliseconds."""
_T = TypeVar("_T")


@dataclass(eq=False)
class _Answer:
    """One that runs."""

    began: float
    waits_since: float | None
    """When its next token was asked for; None while that one is read."""
    deadline: float
    is_late: bool = False
    """Whether its deadline passed while a token was waited for. Where one was being read, its client was slow."""
    first_s: float | None = None
    outcome: Literal["answered", "failed", "abandoned"] = "abandoned"
    patience: asyncio.Timeout | None = None
    """What ends the wait for its first token."""


_WHOLE: ContextVar[_Answer | None] = ContextVar("whole", default=None)
"""What the vectors are parts of which a task makes."""


@dataclass
class CountedEngine:
    """An engine whose answers are counted."""

    inner: Engine
    _counts: Tally = field(default_factory=Tally)
    _running: set[_Answer] = field(default_factory=set)
    _heard_at: float = -math.inf
    """When anybody got a token last."""
    _patience_s: float = math.inf
    _late_until: float = -math.inf
    """Until when answers that begin have chosen this version before it was to be given up."""

    @property
    def tally(self) -> Tally:
        """The counts, with how long those that run have waited by now."""
        now, waits = time.monotonic(), self._counts.waits
        for answer in self._running:
            if answer.waits_since is not None:
                waits = counted(waits, now - answer.waits_since)
        return replace(self._counts, waits=waits)

    @property
    def max_model_len(self) -> int:
        return self.inner.max_model_len

    @property
    def media_encoder(self) -> MediaEncoder | None:
        return self.inner.media_encoder

    @property
    def can_constrain(self) -> bool:
        return self.inner.can_constrain

    @property
    def embedding(self) -> Embedding | None:
        return self.inner.embedding

    async def start(self) -> None:
        await self.inner.start()

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        deltas = self.inner.generate(request)
        try:
            with self._counted() as answer:
                asked_at = answer.began
                delta = await self._first(answer, anext(deltas, None))
                while delta is not None:
                    if asked_at < answer.deadline <= self._heard_at:
                        answer.is_late = True
                    if delta.finish_reason is not None:
                        answer.outcome = "answered"  # before it is taken: who has the end of an answer asks for no more
                    answer.waits_since = None
                    yield delta
                    answer.waits_since = asked_at = time.monotonic()
                    delta = await anext(deltas, None)
                    self._heard_at = time.monotonic()
        finally:
            await deltas.aclose()

    async def embed(self, ids: Sequence[int], num_dims: int | None = None) -> np.ndarray:
        whole = _WHOLE.get()
        with self._counted() if whole is None else nullcontext(whole) as answer:
            vector = self.inner.embed(ids, num_dims)
            if answer.patience is None and answer.first_s is None:
                return await self._first(answer, vector)
            found = await vector
            self._heard_at = answer.waits_since = time.monotonic()
            return found

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """The vectors that are made within are one answer: those of the texts of one request."""
        with self._counted() as answer:
            token = _WHOLE.set(answer)
            try:
                yield
            finally:
                _WHOLE.reset(token)

    @contextmanager
    def _counted(self) -> Iterator[_Answer]:
        answer = self._begin()
        try:
            yield answer
            answer.outcome = "answered"
        except Exception as error:
            answer.outcome = _outcome_of(error)
            raise
        finally:
            self._end(answer)

    async def _first(self, answer: _Answer, token: Awaitable[_T]) -> _T:
        """What an answer begins with, for which is waited until `give_up`. Raises ServeError then."""
        patience = answer.patience = asyncio.timeout(None)
        try:
            async with patience:
                if answer.began < self._late_until:
                    self._give_up(answer, self._patience_s)
                found = await token
        except TimeoutError:
            if not patience.expired():
                raise
            raise ServeError("was given up: its version has lost its traffic and had not begun to answer") from None
        finally:
            answer.patience = None
        self._heard_at = answer.waits_since = time.monotonic()
        answer.first_s = self._heard_at - answer.began
        return found

    def miss(self) -> None:
        """Count an answer that it did not begin: it is down, or did not take what another version took."""
        self._counts = replace(self._counts, started=self._counts.started + 1, failed=self._counts.failed + 1)

    def give_up(self, patience_s: float) -> None:
        """Have answers fail that wait for their first token once nobody has got any for `patience_s`: it hangs.

        Another version can give them. While it gives tokens to others, they queue there and are waited for. So is it
        with those that begin soon after, which had chosen it before.
        """
        self._patience_s, self._late_until = patience_s, time.monotonic() + _LATE_S
        for answer in self._running:
            self._give_up(answer, patience_s)

    def _give_up(self, answer: _Answer, patience_s: float) -> None:
        """Have it fail now if it is time, else look again when it may be."""
        if answer.patience is None:
            return  # it has begun, or was given up
        loop = asyncio.get_running_loop()
        left_s = max(answer.began, self._heard_at) + patience_s - time.monotonic()
        if left_s > 0:
            loop.call_later(left_s, self._give_up, answer, patience_s)
        else:
            answer.patience.reschedule(loop.time())
            answer.patience = None

    def _begin(self) -> _Answer:
        self._counts = replace(self._counts, started=self._counts.started + 1)
        answer = _Answer(began := time.monotonic(), began, DEADLINE.get())
        self._running.add(answer)
        return answer

    def _end(self, answer: _Answer) -> None:
        self._running.discard(answer)
        now, then = time.monotonic(), self._counts
        waits_since = math.inf if answer.waits_since is None else answer.waits_since
        late = answer.is_late or waits_since < answer.deadline <= now + _EARLY_S
        if answer.outcome == "abandoned" and late:
            answer.outcome, then = "failed", replace(then, late=then.late + 1)
        counts = replace(then, **{answer.outcome: getattr(then, answer.outcome) + 1})
        if answer.outcome == "abandoned" and answer.waits_since is not None:
            counts = replace(counts, waits=counted(counts.waits, now - answer.waits_since))
        if answer.outcome == "answered" and answer.first_s is not None:
            whole = counted(counts.whole, now - answer.began)
            counts = replace(counts, first=counted(counts.first, answer.first_s), whole=whole)
        self._counts = counts

    def check(self) -> None:
        self.inner.check()

    async def close(self) -> None:
        await self.inner.close()


def _outcome_of(error: Exception) -> Literal["answered", "failed", "abandoned"]:
    if isinstance(error, ApiError) and error.status == 429:
        return "abandoned"
    return "answered" if isinstance(error, Refused) else "failed"


class Versions:
    """The versions of one model. A request that names one gets it; any other gets one by weight.

    What another version than the live one could not answer is then answered by the live one.
    """

    def __init__(self, models: Mapping[str, ServedModel], weights: Mapping[str, float], live: str) -> None:
        self._models, self._live, self._weights = dict(models), live, dict(weights)
        self._next = WeightedPick(weights)

    @property
    def takes_media(self) -> bool:
        """Whether there may be more than text in a conversation."""
        return any(model.takes_media for model in self._models.values())

    @property
    def embeds(self) -> bool:
        """Whether it makes embeddings, as far as all versions do."""
        return all(model.embeds for model in self._models.values())

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its answer together, by the live version."""
        return self._models[self._live].max_model_len

    @property
    def lineage(self) -> dict[str, Any] | None:
        """That of the live version, with those of all versions and their shares as `versions`."""
        versions = [
            {**(model.lineage or {"version": name}), "share": round(self._weights.get(name, 0.0), 4)}
            for name, model in self._models.items()
        ]
        return {**(self._models[self._live].lineage or {"version": self._live}), "versions": versions}

    def pick(self, version: str | None) -> ServedModel:
        """The version asked for, else the next by weight that is not down. Raises ApiError (404) for an unknown one."""
        if version is None:
            return self._well(self._next())
        if version not in self._models:
            raise unknown_version()
        return self._models[version]

    def _well(self, version: str) -> ServedModel:
        """The version, or the live one where this one is known to be down, which counts as a failure of it."""
        model = self._models[version]
        if version != self._live:
            try:
                model.check()
            except ServeError:
                self.blame(model)
                return self._models[self._live]
        return model

    def instead_of(self, failed: ServedModel) -> ServedModel | None:
        """The live version. For a request that began before it was live, that is another than the one of then."""
        live = self._models[self._live]
        return None if failed is live else live

    def blame(self, refusing: ServedModel) -> None:
        """Count a request against the version that would not take it, for another has answered it."""
        if isinstance(refusing.engine, CountedEngine):
            refusing.engine.miss()

    def check(self) -> None:
        """Raises ServeError when no version can answer any more."""
        failures = []
        for model in self._models.values():
            try:
                model.check()
            except ServeError as error:
                failures.append(error)
        if len(failures) == len(self._models):
            raise failures[0]
