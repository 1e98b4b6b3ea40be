"""Row formats, one module each: `matches(columns)` scores a set of columns, `normalise(row)` gives a Sample.

A format knows the columns of its rows; what conversations have in common is in `rayswift.data.conversation`.
"""

from __future__ import annotations

from typing import Any, Protocol

from rayswift.data.types import Sample


class RowError(ValueError):
    """What is wrong with one row; it is quarantined under this reason and the run goes on."""


class Format(Protocol):
    """How the rows of a source are written."""

    def matches(self, columns: frozenset[str]) -> int:
        """How well rows with these columns fit, 0 for not at all; the highest score is chosen."""
        ...

    def normalise(self, row: dict[str, Any]) -> Sample:
        """The row as a Sample. Raises RowError saying what is wrong with it."""
        ...
