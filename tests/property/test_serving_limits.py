"""Invariants of a key's limits: no minute has more requests than allowed, none fewer than it could, places add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    assert caught.value.status == 429
    return caught.value


@given(st.integers(1, 6), st.lists(st.integers(0, 30 * SECOND_NS), max_size=80))
def test_no_window_has_more_than_the_limit_and_no_fewer_than_it_could(limit: int, gaps: list[int]) -> None:
    clock = _Clock()
    limits, let_in = KeyLimits(limit, None, clock), list[int]()
    for gap in gaps:
        clock.ns += gap
        recent = [at for at in let_in if at > clock.ns - WINDOW_NS]
        if len(recent) < limit:
            headers = limits.enter().headers
            let_in.append(clock.ns)
            assert headers["x-ratelimit-remaining-requests"] == str(limit - len(recent) - 1)
        else:
            wait_ns = int(_refused(limits).headers["Retry-After"]) * SECOND_NS
            assert 0 <= wait_ns - (recent[0] + WINDOW_NS - clock.ns) < SECOND_NS
        assert len(limits._ends) <= limit


@given(st.integers(1, 5), st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=60))
def test_in_flight_is_what_is_held(limit: int, steps: list[tuple[bool, int]]) -> None:
    limits, held = KeyLimits(None, limit, _Clock()), list[object]()
    places = []
    for enters, which in steps:
        if enters and len(held) < limit:
            places.append(limits.enter())
            held.append(places[-1])
        elif enters:
            _refused(limits)
        elif places:
            place = places[which % len(places)]  # perhaps one that was given back before
            place.release()
            held = [one for one in held if one is not place]
        assert limits.in_flight == len(held)
