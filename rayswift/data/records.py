"""CSV records that lose no line: a quote that is never closed costs the lines it broke, not the rest of the file.

Knows quotes and lines. What a record's fields are called, and whether they are UTF-8, is known by `readers/csv`.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

UNCLOSED = "has a quote that is never closed"
_OPEN = "unexpected end of data"  # what the csv module says of a quote that is still open
_MAX_RECORD_BYTES = 16 << 20
"""A quote that is still open after so many bytes counts as never closed: they are held in memory to be read again."""

# The default limit of 128 KiB is shorter than documents are.
csv.field_size_limit(2**31 - 1)


@dataclass(frozen=True, slots=True)
class Record:
    """The bytes of whole lines and their fields as latin-1 text (none for a blank line), or what is wrong.

    `in_step` is false where what follows was read with the record in mind: reading must not start there.
    """

    raw: bytes
    fields: list[str]
    fault: str | None = None
    in_step: bool = True


def records(lines: Iterator[bytes], delimiter: str, num_fields: int | None) -> Iterator[Record]:
    """Every line in exactly one record, in order. `num_fields` None: the first record with fields decides.

    Where a record over several lines is broken, it is taken for a row with an open quote if each of the other lines
    is a row by itself, and they are read as such; otherwise each of its lines is a bad record.
    """
    source = _Lines(lines)
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    astray = False  # after a broken quote, until a line is a row again
    while (found := _next(reader, source)) is not None:
        taken, fields, fault = found
        if fault is not None:
            reader = csv.reader(source, delimiter=delimiter, strict=True)
        elif fields and num_fields not in (None, len(fields)):
            fault = f"has {len(fields)} fields, the header has {num_fields}"
        if fault is not None and len(taken) > 1:
            astray = fault == UNCLOSED or _are_rows(taken[1:], delimiter, num_fields)
            if astray:
                source.give_back(taken[1:])
            yield from _broken(taken[:1], UNCLOSED, in_step=False) if astray else _broken(taken, fault, in_step=True)
            continue
        raw = b"".join(taken)
        if fault is not None and not fields and fault != UNCLOSED:
            fields, fault = _lenient(raw, delimiter, num_fields, fault)
        if astray and len(taken) == 1 and raw.count(b'"') % 2:
            fault = UNCLOSED  # the rest of a text whose beginning was broken
        astray = astray and (fault is not None or not fields)
        num_fields = num_fields or len(fields) or None
        yield Record(raw, fields, fault, in_step=not astray)


def _broken(lines: Sequence[bytes], fault: str, *, in_step: bool) -> Iterator[Record]:
    for place, line in enumerate(lines, 1):
        yield Record(line, [], None if _is_blank(line) else fault, in_step=in_step and place == len(lines))


def _is_blank(line: bytes) -> bool:
    return not line.strip(b"\r\n")


class _TooLong(Exception):
    """More bytes than a record may have."""


class _Lines:
    """Lines as latin-1 text; those of the record that is being read can be taken, and given back to be read again."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self._again: deque[bytes] = deque()
        self._taken: list[bytes] = []
        self._size = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if self._size > _MAX_RECORD_BYTES and self._taken:
            raise _TooLong
        line = self._again.popleft() if self._again else next(self._lines)
        self._taken.append(line)
        self._size += len(line)
        return line.decode("latin-1")

    def taken(self) -> list[bytes]:
        """The lines since the last call."""
        taken, self._taken, self._size = self._taken, [], 0
        return taken

    def give_back(self, lines: Sequence[bytes]) -> None:
        self._again.extendleft(reversed(lines))


def _next(reader: Iterator[list[str]], source: _Lines) -> tuple[list[bytes], list[str], str | None] | None:
    """Lines, fields and fault of the next record; None at the end."""
    fields: list[str] = []
    fault = None
    try:
        fields = next(reader)
    except StopIteration:
        return None
    except _TooLong:
        fault = UNCLOSED
    except csv.Error as error:
        fault = UNCLOSED if _OPEN in str(error) else f"is not CSV: {error}"
    return source.taken(), fields, fault


def _are_rows(lines: Sequence[bytes], delimiter: str, num_fields: int | None) -> bool:
    """Whether each line is a row by itself; the last, which broke the record, may open a quote of its own."""
    kinds = [_kind(line, delimiter, num_fields) for line in lines]
    return all(kind == "row" for kind in kinds[:-1]) and kinds[-1] in ("row", "open")


def _kind(line: bytes, delimiter: str, num_fields: int | None) -> Literal["row", "open", "neither"]:
    if _is_blank(line):
        return "row"
    try:
        fields = next(csv.reader([line.decode("latin-1")], delimiter=delimiter, strict=True))
    except csv.Error as error:
        return "open" if _OPEN in str(error) else "neither"
    return "row" if len(fields) == num_fields and not line.count(b'"') % 2 else "neither"


def _lenient(raw: bytes, delimiter: str, num_fields: int | None, fault: str) -> tuple[list[str], str | None]:
    """One line that breaks the rules on quotes (`"a"b,c`), read as most programs read it if its fields fit."""
    try:
        fields = next(csv.reader([raw.decode("latin-1")], delimiter=delimiter))
    except csv.Error:
        return [], fault
    return (fields, None) if num_fields in (None, len(fields)) else ([], fault)
