"""What parts of an answer count in the loss: tables of patterns, one module each; `data.loss` chains them by name.

A table gives a regular expression a factor, for what it matches, or two factors: for a delimiter, and for what
follows it up to the table's next delimiter. What no pattern of a table reaches keeps its weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

Factors = float | tuple[float, float]


class Weighting(Protocol):
    """A named table. `^` is where the answer starts, `.` matches newlines too."""

    table: ClassVar[Mapping[str, Factors]]
