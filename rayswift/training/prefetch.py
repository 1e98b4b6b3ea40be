"""Prepares the next steps' batches while the current one computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetched(Generic[T]):
    """An iterator read ahead by a daemon thread; an error of its source is raised in the place it belongs.

    The source is opened in the thread too, so that its start overlaps with loading the model.
    """

    def __init__(self, open_source: Callable[[], Iterable[T]], depth: int = 2) -> None:
        self._open = open_source
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item, ended = self._queue.get()
        if ended is not None:
            self._put(None, ended)  # whoever asks again is told again
            raise ended
        assert item is not None, "only the end comes without an item"
        return item

    def close(self) -> None:
        """Stop reading ahead."""
        self._stopped.set()

    def _fill(self) -> None:
        try:
            for item in self._open():
                if not self._put(item, None):
                    return
            self._put(None, StopIteration())
        except BaseException as error:  # handed to the reader, which raises it
            self._put(None, error)

    def _put(self, item: T | None, ended: BaseException | None) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put((item, ended), timeout=0.2)
                return True
            except queue.Full:
                continue
        return False
