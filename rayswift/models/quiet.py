"""Progress bars of other people's libraries, silenced where RaySwift shows its own. What they warn of is still seen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

_lock = threading.Lock()
_found: list[Any] = []
"""What each silencing that is under way has found as tqdm's own; the first is."""


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Silences the bars of transformers, of the hub, and those that compressed-tensors makes with tqdm itself."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    shown, hub_shown = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        with _without_tqdm():
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
        if hub_shown:
            enable_progress_bars()


@contextmanager
def _without_tqdm() -> Iterator[None]:
    """Bars that are made with tqdm meanwhile say nothing, whatever whoever makes one says.

    A workaround (November 2026, tqdm 4.70): its one switch, TQDM_DISABLE, is read as it is imported, and
    compressed-tensors 0.19 has none for its bars. A tqdm that knows no `disable` keeps them.
    """
    from tqdm import tqdm

    kind: Any = tqdm
    with _lock:
        _found.append(kind.__dict__["__init__"])
        if len(_found) == 1 and "disable" in signature(kind.__init__).parameters:
            kind.__init__ = _disabled(kind.__init__)
    try:
        yield
    finally:
        with _lock:
            last = _found.pop()
            if not _found:
                kind.__init__ = last


def _disabled(begin: Callable[..., None]) -> Callable[..., None]:
    return lambda bar, *args, **given: begin(bar, *args, **{**given, "disable": True})
