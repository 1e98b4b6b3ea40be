"""Rows that are named beside a job, read as the job would read them: to judge by, or to calibrate on.

Knows a job's sources. Opens nothing.
"""

from __future__ import annotations

import os
from typing import Any, Literal

from rayswift.config.job import DataSource, DataSpec
from rayswift.data.types import MediaKind

_Kinds = tuple[MediaKind, ...] | Literal["auto"]
"""As `MediaSpec.kinds`."""


def as_trained(asked: DataSource, data: DataSpec | None) -> tuple[DataSource, _Kinds]:
    """The source that was asked for as the job has it, or, where it has not, read like the first that it has.

    A format that is asked for says what other rows have, and their columns and turns are then taken as they are.
    """
    if data is None:
        return asked, "auto"
    sources = (*data.eval, *data.train)
    is_auto = asked.format == "auto"
    for one in sources:
        if _place(one.path) == _place(asked.path):
            own = {"path": asked.path, "limit": asked.limit, "weight": 1.0} | (
                {} if is_auto else {"format": asked.format}
            )
            return one.model_copy(update=own), data.media.kinds
    like: dict[str, Any] = {"system": sources[0].system}
    if is_auto:
        like |= {"columns": sources[0].columns, "tags": sources[0].tags}
    return asked.model_copy(update=like), "auto"


def _place(path: str) -> str:
    return path if "://" in path or "::" in path else os.path.abspath(os.path.expanduser(path))
