"""Which format a source's rows have, and a row of any format as a Sample.

Knows the formats through `plugins` only: a new module of `formats/` is found without an edit here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any, cast

from rayswift import plugins
from rayswift.config.job import DataSource
from rayswift.data.conversation import retagged
from rayswift.data.formats import Format, one_row
from rayswift.data.types import Message, Sample
from rayswift.errors import ConfigError

FAMILY = "data.formats"
_TURNS = ("messages", "conversations", "chosen", "rejected", "prompt", "completion")
"""Columns that may hold turns."""


def detect(rows: Iterable[dict[str, Any]], *, path: str = "data.train.0.format") -> str:
    """The name of the format that fits the columns of these rows best. Raises ConfigError when none or several do."""
    columns = frozenset(name for row in rows for name in row)
    scores = {name: load_format(name).matches(columns) for name in plugins.names(FAMILY)}
    best = max(scores.values())
    winners = [name for name, score in scores.items() if score == best]
    if best == 0:
        raise ConfigError(
            f"found no format for the columns {_listed(columns)}",
            path=path,
            value="auto",
            fix=f"map them, as in `columns: {{{min(columns, default='mine')}: text}}`; formats are {', '.join(scores)}",
        )
    if len(winners) > 1:
        raise ConfigError(
            f"is ambiguous for the columns {_listed(columns)}",
            path=path,
            value="auto",
            fix=f"set {' or '.join(winners)}",
        )
    return winners[0]


@cache
def load_format(name: str, *, path: str = "data.train.0.format") -> Format:
    """The format of a name. Raises ConfigError with a suggestion for a name nobody defines."""
    return cast(Format, plugins.load(FAMILY, name, path=path)())


def normalise(row: dict[str, Any], format_name: str, source: DataSource) -> Sample:
    """The row as a Sample, with the source's renamed columns and default system message. Raises RowError."""
    format_ = load_format(format_name)
    with one_row():
        sample = format_.normalise(renamed(row, source))
    if source.system is None or not sample.messages or sample.messages[0].role == "system":
        return sample
    system = Message("system", source.system)
    rejected = (system, *sample.rejected) if sample.rejected else ()
    return replace(sample, messages=(system, *sample.messages), rejected=rejected)


def renamed(row: dict[str, Any], source: DataSource) -> dict[str, Any]:
    """The row with the source's `columns` renamed, and the `tags` of its turns; a renamed column replaces one of that
    name. A row without a `question` is asked the source's."""
    if source.columns:
        kept = {name: value for name, value in row.items() if name not in source.columns}
        row = kept | {new: row[old] for old, new in source.columns.items() if old in row}
    if source.tags:
        row = row | {name: retagged(row[name], source.tags) for name in _TURNS if name in row}
    if source.question is not None and not row.get("question"):
        row = row | {"question": source.question}
    return row


def _listed(columns: frozenset[str]) -> str:
    return ", ".join(sorted(columns)) or "(none)"
