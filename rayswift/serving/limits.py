"""How much one key may ask: requests within a minute and at the same time, counted in one replica.

Knows counts and a clock that is handed in; knows neither keys nor HTTP beyond the names of headers. Whole nanoseconds,
so that what is told as Retry-After is never too short by a rounding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from rayswift.serving.api_errors import ApiError, over_limit

SECOND_NS = 10**9
WINDOW_NS = 60 * SECOND_NS


class KeyLimits:
    """What one key uses. In no stretch of 60 s are more requests let in than its limit, wherever the stretch begins.

    Holds one number per request of the last minute, so never more than `requests_per_minute` of them. Used from one
    event loop, so it needs no lock. `now_ns` never goes back.
    """

    def __init__(self, requests_per_minute: int | None, max_concurrency: int | None, now_ns: Callable[[], int]) -> None:
        self._per_minute, self._max_concurrency, self._now_ns = requests_per_minute, max_concurrency, now_ns
        self._ends = deque[int]()  # when each request of the last minute stops to count, oldest first
        self.in_flight = 0

    def enter(self) -> KeyPlace:
        """A place for one request. Raises ApiError (429) over a limit; what is refused counts against neither."""
        now = self._now_ns()
        while self._ends and self._ends[0] <= now:
            self._ends.popleft()
        if self._max_concurrency is not None and self.in_flight >= self._max_concurrency:
            message = f"this API key is at its limit of {self._max_concurrency} requests at the same time"
            raise over_limit(message, 1, self._headers(now))
        if self._per_minute is not None:
            if len(self._ends) >= self._per_minute:
                raise self._too_many(self._per_minute, now)
            self._ends.append(now + WINDOW_NS)
        self.in_flight += 1
        return KeyPlace(self, self._headers(now))

    def _too_many(self, limit: int, now: int) -> ApiError:
        wait_s = _ceil_div(self._ends[0] - now, SECOND_NS)
        message = f"this API key is at its limit of {limit} requests per minute; try again in {wait_s} s"
        return over_limit(message, wait_s, self._headers(now))

    def _headers(self, now: int) -> dict[str, str]:
        """OpenAI's headers for a limit of requests: how many, how many are left, when all of them will be again."""
        if self._per_minute is None:
            return {}
        reset_ms = _ceil_div(self._ends[-1] - now, 10**6) if self._ends else 0
        return {
            "x-ratelimit-limit-requests": str(self._per_minute),
            "x-ratelimit-remaining-requests": str(self._per_minute - len(self._ends)),
            "x-ratelimit-reset-requests": f"{reset_ms / 1000:g}s",
        }


class KeyPlace:
    """What a request holds while it is answered, as a context, and the headers of its answer. Given back once."""

    def __init__(self, limits: KeyLimits, headers: dict[str, str]) -> None:
        self._limits, self.headers, self._held = limits, headers, True

    def release(self) -> None:
        """Give the place back; a second time changes nothing."""
        self._limits.in_flight -= self._held
        self._held = False

    def __enter__(self) -> KeyPlace:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _ceil_div(number: int, by: int) -> int:
    return -(-number // by)
