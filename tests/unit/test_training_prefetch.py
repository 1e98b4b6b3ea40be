"""Reading ahead: the order stays, errors come in their place, and no more is read than may be."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest

from rayswift.training.prefetch import Prefetched


def test_items_come_in_order() -> None:
    ahead = Prefetched(lambda: itertools.count())
    assert list(itertools.islice(ahead, 50)) == list(range(50))
    ahead.close()


def test_an_error_is_raised_in_its_place_and_again() -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("row 3 is broken")

    ahead = Prefetched(source)
    assert [next(ahead), next(ahead)] == [1, 2]
    for _ in range(2):
        with pytest.raises(ValueError, match="row 3 is broken"):
            next(ahead)
    ahead.close()


def test_an_error_while_opening_is_raised_too() -> None:
    def source() -> Iterator[int]:
        raise FileNotFoundError("rows.jsonl")

    ahead = Prefetched(source)
    with pytest.raises(FileNotFoundError):
        next(ahead)
    ahead.close()


def test_it_ends_where_its_source_ends_and_stays_there() -> None:
    ahead = Prefetched(lambda: [1, 2])
    assert list(ahead) == [1, 2]
    assert list(ahead) == []
    ahead.close()


def test_depth_bounds_what_is_read_ahead() -> None:
    produced = threading.Semaphore(0)
    taken: list[int] = []

    def source() -> Iterator[int]:
        for number in itertools.count():
            taken.append(number)
            produced.release()
            yield number

    ahead = Prefetched(source, depth=2)
    for _ in range(3):  # two in the queue, one in hand
        assert produced.acquire(timeout=10)
    assert not produced.acquire(timeout=0.5)
    assert taken == [0, 1, 2]
    assert next(ahead) == 0
    assert produced.acquire(timeout=10)
    assert taken == [0, 1, 2, 3]
    ahead.close()


def test_closing_ends_the_thread() -> None:
    ahead = Prefetched(lambda: itertools.count())
    assert next(ahead) == 0
    ahead.close()
    ahead._thread.join(timeout=10)
    assert not ahead._thread.is_alive()
