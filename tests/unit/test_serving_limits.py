"""What a key may ask, on a clock that only the test moves: exact windows, places given back once, bounded memory."""

from __future__ import annotations

import pytest

from rayswift.serving.api_errors import ApiError
from rayswift.serving.limits import SECOND_NS, WINDOW_NS, KeyLimits


class _Clock:
    def __init__(self) -> None:
        self.ns = 5 * SECOND_NS

    def __call__(self) -> int:
        return self.ns


def _refused(limits: KeyLimits) -> ApiError:
    with pytest.raises(ApiError) as caught:
        limits.enter()
    assert (caught.value.status, caught.value.kind, caught.value.code) == (
        429, "requests", "rate_limit_exceeded"
    )  # fmt: skip
    return caught.value


def test_the_window_lets_through_again_exactly_when_it_says() -> None:
    clock = _Clock()
    limits = KeyLimits(2, None, clock)
    assert limits.enter().headers == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "60s",
    }
    clock.ns += 1_500_000_000
    limits.enter()
    error = _refused(limits)
    assert "2 requests per minute" in str(error)
    assert error.headers["Retry-After"] == "59"
    assert error.headers["x-ratelimit-remaining-requests"] == "0"
    clock.ns += WINDOW_NS - 1_500_000_000 - 1
    assert _refused(limits).headers["Retry-After"] == "1"  # a nanosecond is told as a second, never as none
    clock.ns += 1
    assert limits.enter().headers["x-ratelimit-remaining-requests"] == "0"


def test_places_are_given_back_once() -> None:
    limits = KeyLimits(None, 2, _Clock())
    first, second = limits.enter(), limits.enter()
    assert first.headers == {}
    assert set(_refused(limits).headers) == {"Retry-After"}
    first.release()
    first.release()
    assert limits.in_flight == 1
    with pytest.raises(ZeroDivisionError), limits.enter():
        _ = 1 / 0
    second.release()
    assert limits.in_flight == 0


def test_what_is_refused_counts_against_neither_limit() -> None:
    limits = KeyLimits(2, 1, _Clock())
    place = limits.enter()
    for _ in range(5):
        assert _refused(limits).headers["x-ratelimit-remaining-requests"] == "1"
    place.release()
    limits.enter().release()
    assert "per minute" in str(_refused(limits))
    assert limits.in_flight == 0
