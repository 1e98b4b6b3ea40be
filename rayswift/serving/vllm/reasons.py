"""Why vLLM's core or a worker of it did not start, in its own words: its caller is only told to look into a log.

Each of these processes runs `keep_first_error` (an entry point of vLLM's, see `plugin.py`) and writes the first error
that it logs into a file whose place it inherits.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_PLACE = "RAYSWIFT_VLLM_REASON"
_MOST_CHARS = 400


def keep_first_error() -> None:
    """Have the first error that is logged here with its exception kept; nothing in a process vLLM did not start."""
    place = os.environ.get(_PLACE)
    known = any(isinstance(handler, _FirstError) for handler in logging.getLogger("vllm").handlers)
    if place and not known and multiprocessing.parent_process() is not None:
        logging.getLogger("vllm").addHandler(_FirstError(Path(place)))


class _FirstError(logging.Handler):
    def __init__(self, place: Path) -> None:
        super().__init__(logging.ERROR)
        self._place = place

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return
        try:
            # a worker ends before the core that waits for it: who is first knows, and the others follow from it
            with self._place.open("x", encoding="utf-8") as file:
                file.write(in_a_line(error))
        except OSError:
            pass  # told already, or nobody waits for it any more


@contextmanager
def kept() -> Iterator[Callable[[], str | None]]:
    """What the first error was in processes that vLLM starts meanwhile; None when there was none."""
    with tempfile.TemporaryDirectory(prefix="rayswift-vllm-") as folder:
        place = Path(folder) / "reason"
        os.environ[_PLACE] = str(place)
        try:
            yield lambda: place.read_text(encoding="utf-8") if place.is_file() else None
        finally:
            del os.environ[_PLACE]


def in_a_line(error: BaseException) -> str:
    """An error's words, or its name where it has none."""
    return " ".join(str(error).split())[:_MOST_CHARS] or type(error).__name__
