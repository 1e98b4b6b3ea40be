"""Row formats, one module each: `matches(columns)` scores a set of columns, `normalise(row)` gives a Sample.

A format knows the columns of its rows; what conversations have in common is in `rayswift.data.conversation`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rayswift.data.types import Sample
from rayswift.errors import RaySwiftError


class RowError(ValueError):
    """What is wrong with one row; it is quarantined under this reason and the run goes on."""


class UnusedRow(RowError):
    """Why a row that is well made is not trained on; it is quarantined like a bad one, and is none."""


@contextmanager
def one_row() -> Iterator[None]:
    """Whatever the work on one row raises becomes a RowError with the exception's name.

    Data and chat templates are other people's: what they provoke cannot be listed, and must not end a run of days.
    Nothing is hidden: the row is quarantined with the reason, and too many of them end the run.
    """
    try:
        yield
    except (RowError, RaySwiftError, MemoryError):  # known faults; a job that cannot work; a machine that cannot
        raise
    except Exception as error:
        raise RowError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


class Format(Protocol):
    """How the rows of a source are written."""

    def matches(self, columns: frozenset[str]) -> int:
        """How well rows with these columns fit, 0 for not at all; the highest score is chosen."""
        ...

    def normalise(self, row: dict[str, Any]) -> Sample:
        """The row as a Sample. Raises RowError saying what is wrong with it."""
        ...
