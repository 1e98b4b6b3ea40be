"""Which version answers the next request, and how each is doing: weights, counts and latencies of several versions.

Knows the engine protocol and one event loop. Where the weights come from and who looks at the counts is not known here.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rayswift.errors import ServeError
from rayswift.serving.api_errors import unknown_version
from rayswift.serving.engine import Delta, Embedding, Engine, Refused, Request
from rayswift.serving.served import ServedModel

if TYPE_CHECKING:
    from rayswift.data.media.encoder import MediaEncoder

EDGES_S = tuple(0.001 * 1.25**power for power in range(64))
"""Upper edges of the latency buckets: 1 ms to 21 minutes, each a quarter wider than the one before."""
_NONE_YET = (0,) * (len(EDGES_S) + 1)


@dataclass(frozen=True)
class Tally:
    """Counts of answers since a start. Invariant: started >= answered + failed + abandoned.

    `first` and `whole` count the seconds to the first token and to the last, by bucket. A request that was refused as
    its client's fault is answered; one whose client went away, or that ran out of time, is abandoned.
    """

    started: int = 0
    answered: int = 0
    failed: int = 0
    abandoned: int = 0
    first: tuple[int, ...] = _NONE_YET
    whole: tuple[int, ...] = _NONE_YET

    @property
    def ended(self) -> int:
        """Answers that were given or failed."""
        return self.answered + self.failed

    @property
    def running(self) -> int:
        """Answers that have not ended yet."""
        return self.started - self.ended - self.abandoned

    def __add__(self, other: Tally) -> Tally:
        """Both together."""
        return self._with(other, 1)

    def __sub__(self, earlier: Tally) -> Tally:
        """What was counted since an earlier tally of the same."""
        return self._with(earlier, -1)

    def _with(self, other: Tally, sign: int) -> Tally:
        return Tally(
            self.started + sign * other.started,
            self.answered + sign * other.answered,
            self.failed + sign * other.failed,
            self.abandoned + sign * other.abandoned,
            tuple(a + sign * b for a, b in zip(self.first, other.first, strict=True)),
            tuple(a + sign * b for a, b in zip(self.whole, other.whole, strict=True)),
        )


def counted(buckets: tuple[int, ...], seconds: float) -> tuple[int, ...]:
    """The buckets with one more latency in them."""
    place = bisect.bisect_left(EDGES_S, seconds)
    return (*buckets[:place], buckets[place] + 1, *buckets[place + 1 :])


def quantile_s(buckets: tuple[int, ...], fraction: float) -> float | None:
    """The upper edge of the bucket that holds this quantile, in seconds; None where nothing was counted."""
    wanted, seen = fraction * sum(buckets), 0
    for edge, count in zip((*EDGES_S, EDGES_S[-1] * 1.25), buckets, strict=True):
        seen += count
        if count and seen >= wanted:
            return edge
    return None


@dataclass
class CountedEngine:
    """An engine whose answers are counted."""

    inner: Engine
    tally: Tally = field(default_factory=Tally)

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
        began, first_s, outcome = time.monotonic(), None, "abandoned"
        self.tally = replace(self.tally, started=self.tally.started + 1)
        deltas = self.inner.generate(request)
        try:
            async for delta in deltas:
                first_s = first_s or time.monotonic() - began
                if delta.finish_reason is not None:
                    outcome = "answered"  # before it is taken: who has the end of an answer does not ask for more
                yield delta
            outcome = "answered"
        except Refused:
            outcome = "answered"
            raise
        except Exception:
            outcome = "failed"
            raise
        finally:
            self._end(outcome, first_s, time.monotonic() - began)
            await deltas.aclose()

    async def embed(self, ids: Sequence[int], num_dims: int | None = None) -> np.ndarray:
        began, outcome = time.monotonic(), "abandoned"
        self.tally = replace(self.tally, started=self.tally.started + 1)
        try:
            vector = await self.inner.embed(ids, num_dims)
            outcome = "answered"
            return vector
        except Exception as error:
            outcome = "answered" if isinstance(error, Refused) else "failed"
            raise
        finally:
            took_s = time.monotonic() - began
            self._end(outcome, took_s, took_s)

    def miss(self) -> None:
        """Count an answer that it was not asked for because it is down."""
        self.tally = replace(self.tally, started=self.tally.started + 1, failed=self.tally.failed + 1)

    def _end(self, outcome: str, first_s: float | None, whole_s: float) -> None:
        now = replace(self.tally, **{outcome: getattr(self.tally, outcome) + 1})
        if outcome == "answered" and first_s is not None:
            now = replace(now, first=counted(now.first, first_s), whole=counted(now.whole, whole_s))
        self.tally = now

    def check(self) -> None:
        self.inner.check()

    async def close(self) -> None:
        await self.inner.close()


class WeightedPick:
    """Names in turn, each as often as its weight says: over any number of picks at most one too few or too many.

    Smooth weighted round robin, as in nginx. Weights are not negative and not all zero.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = {name: weight for name, weight in weights.items() if weight > 0}
        assert self._weights, "one version has to answer"
        self._total, self._credit = sum(self._weights.values()), dict.fromkeys(self._weights, 0.0)

    def __call__(self) -> str:
        for name, weight in self._weights.items():
            self._credit[name] += weight
        chosen = max(self._credit, key=self._credit.__getitem__)
        self._credit[chosen] -= self._total
        return chosen


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
                if isinstance(model.engine, CountedEngine):
                    model.engine.miss()
                return self._models[self._live]
        return model

    def instead_of(self, failed: ServedModel) -> ServedModel | None:
        """The live version. For a request that began before it was live, that is another than the one of then."""
        live = self._models[self._live]
        return None if failed is live else live

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
