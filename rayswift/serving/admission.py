"""How many answers may run and wait at once: a bounded queue's front door.

Knows counts only. What runs and what waits is decided by the engine; this refuses before anything is queued.
"""

from __future__ import annotations

from rayswift.serving.api_errors import ApiError, overloaded

_MAX_RETRY_S = 30


class Admission:
    """Places for answers of one model in one replica. Used from one event loop, so it needs no lock."""

    def __init__(self, max_concurrency: int, max_queued: int) -> None:
        self.max_concurrency, self._limit = max_concurrency, max_concurrency + max_queued
        self.in_flight = 0

    def enter(self, num_answers: int) -> Places:
        """Places for a request's answers, all or none. Raises ApiError: 429 when full, 400 when never possible."""
        if num_answers > self._limit:
            raise ApiError(f"n: {num_answers} answers are more than this server's {self._limit} places", param="n")
        if self.in_flight + num_answers > self._limit:
            raise overloaded(self._retry_after_s())
        self.in_flight += num_answers
        return Places(self, num_answers)

    def _retry_after_s(self) -> int:
        """A rough wait in whole seconds: a second per batch that is ahead."""
        return min(_MAX_RETRY_S, 1 + self.in_flight // self.max_concurrency)


class Places:
    """What a request holds while it runs, as a context. Giving back twice gives back once."""

    def __init__(self, admission: Admission, num_answers: int) -> None:
        self._admission, self._num_answers = admission, num_answers

    def release(self) -> None:
        """Give the places back."""
        self._admission.in_flight -= self._num_answers
        self._num_answers = 0

    def __enter__(self) -> Places:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
