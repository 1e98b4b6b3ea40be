"""Bad rows: the budget they have, and the file they are kept in. No Ray, no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence

from rayswift.data.types import BadRow
from rayswift.errors import DataError

_SHOWN = 3


def describe(bad: Sequence[BadRow]) -> str:
    """`file:line: reason` of the first few bad rows, on one line."""
    shown = "; ".join(f"{place(row)}: {row.reason}" for row in bad[:_SHOWN])
    return f"{shown}; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else shown


def place(row: BadRow) -> str:
    """`file:line`, or `file row N` (from 0) where the kind of file has no lines."""
    return f"{row.file}:{row.line}" if row.line is not None else f"{row.file} row {row.row}"


def check(bad: Sequence[BadRow], total_rows: int, max_bad_fraction: float) -> None:
    """Raises DataError when more than `max_bad_fraction` of `total_rows` rows are bad (see `StreamPlan.rows_at_stake`).

    `bad` holds each row once, however many epochs met it (see `Quarantine`). Rows that do not count are no fault.
    """
    bad = [row for row in bad if row.counts]
    if len(bad) > max_bad_fraction * total_rows:
        raise DataError(
            f"{len(bad)} of {total_rows} rows are bad, more than data.max_bad_fraction={max_bad_fraction:g} allows: "
            f"{describe(bad)}; repair them, or raise data.max_bad_fraction"
        )


class Quarantine:
    """quarantine.jsonl: every bad row once, in the order they were met. Used by one process."""

    def __init__(self, path: str, total_rows: int, max_bad_fraction: float) -> None:
        """Continues the file at `path`, a local path or URL; a line cut off by a crash is dropped and written again."""
        self._path, self._total_rows, self._max_bad_fraction = path, total_rows, max_bad_fraction
        self._rows = {row.identity: row for row in _read(path)}

    @property
    def rows(self) -> tuple[BadRow, ...]:
        """The bad rows so far."""
        return tuple(self._rows.values())

    def add(self, bad: Iterable[BadRow]) -> None:
        """Keeps new bad rows on disk, then raises DataError when the budget is exceeded."""
        fresh = {row.identity: row for row in bad if row.identity not in self._rows}
        if fresh:
            self._rows |= fresh
            _write(self._path, self._rows.values())
        check(self.rows, self._total_rows, self._max_bad_fraction)


def _read(path: str) -> list[BadRow]:
    from fsspec.core import url_to_fs

    filesystem, name = url_to_fs(path)
    if not filesystem.exists(name):
        return []
    rows = []
    for line in filesystem.cat_file(name).split(b"\n"):
        try:
            rows.append(BadRow(**json.loads(line)))
        except (ValueError, TypeError):  # cut off by a crash while it was written: the row will be met again
            continue
    return rows


def _write(path: str, rows: Iterable[BadRow]) -> None:
    """Object stores cannot append and the budget bounds the rows, so the file is written whole.

    On a disk it is written beside and renamed: rows before the last checkpoint are never met again, and a crash
    half way would forget them.
    """
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    filesystem, name = url_to_fs(path)
    filesystem.makedirs(name.rpartition("/")[0], exist_ok=True)
    content = "".join(row.to_json() + "\n" for row in rows).encode()
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.pipe_file(name, content)
        return
    with open(f"{name}.tmp", "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(f"{name}.tmp", name)
