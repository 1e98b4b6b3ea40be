"""CSV and TSV with a header line; quoted fields may hold newlines. Every value is text."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator
from typing import IO, ClassVar

from rayswift.data.lines import BOM
from rayswift.data.sources import FileIndex, RawRow, ReadOptions, Span, bad_row, open_file, read_range
from rayswift.errors import DataError

# The default limit of 128 KiB is shorter than documents are.
csv.field_size_limit(2**31 - 1)


class Csv:
    """Reads `.csv` and `.tsv`; spans are byte ranges of whole records."""

    extensions: ClassVar[tuple[str, ...]] = (".csv", ".tsv")

    def index(self, path: str, source: int, options: ReadOptions) -> FileIndex:
        """Byte ranges of the records after the header. Raises DataError for a header that names no columns."""
        with open_file(path) as stream:
            lines = _CountedLines(stream)
            records = csv.reader(lines, delimiter=_delimiter(path))
            try:
                columns = _columns(path, next(records, None))
                spans = tuple(_spans(records, lines, options))
            except csv.Error as error:
                raise DataError(f"{path}:{records.line_num}: is not CSV: {error}; repair the line") from error
        num_rows = sum(span.num_rows for span in spans)
        return FileIndex(
            path, source, "csv", num_rows, lines.position, lines.digest.hexdigest(), spans, columns, options
        )

    def read(self, index: FileIndex, span: Span) -> Iterator[RawRow]:
        """One dict of texts, or BadRow, per record; the line is the record's first."""
        lines = _KeptLines(read_range(index.path, span.start, span.stop))
        records = csv.reader(lines, delimiter=_delimiter(index.path))
        row, line = span.first_row, span.first_line or 1
        for fields in records:
            raw = lines.taken()
            if fields:
                reason = _fault(fields, raw, index.columns)
                values = [field.encode("latin-1").decode("utf-8", "replace") for field in fields]
                yield (
                    row,
                    line,
                    bad_row(index, row, line, reason, raw.decode("utf-8", "replace"))
                    if reason
                    else dict(zip(index.columns, values, strict=True)),
                )
                row += 1
            line += raw.count(b"\n")


class _CountedLines:
    """Lines as latin-1 text, so that `position` counts bytes, hashed on the way."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.position = 0

    def __iter__(self) -> _CountedLines:
        return self

    def __next__(self) -> str:
        raw = next(self._stream)
        self.digest.update(raw)
        if self.position == 0 and raw.startswith(BOM):
            self.position += len(BOM)
            raw = raw.removeprefix(BOM)
        self.position += len(raw)
        return raw.decode("latin-1")


class _KeptLines:
    """Lines as latin-1 text; `taken` gives the bytes of the record just read."""

    def __init__(self, data: bytes) -> None:
        self._lines = io.BytesIO(data)  # splits at newlines only, as the file itself did
        self._taken: list[bytes] = []

    def __iter__(self) -> _KeptLines:
        return self

    def __next__(self) -> str:
        self._taken.append(next(self._lines))
        return self._taken[-1].decode("latin-1")

    def taken(self) -> bytes:
        raw, self._taken = b"".join(self._taken), []
        return raw


def _delimiter(path: str) -> str:
    return "\t" if path.lower().endswith(".tsv") else ","


def _columns(path: str, header: list[str] | None) -> tuple[str, ...]:
    if header is None:
        return ()
    columns = tuple(name.encode("latin-1").decode("utf-8", "replace").strip() for name in header)
    if len(set(columns)) != len(columns) or not all(columns):
        raise DataError(
            f"{path}:1: the header {', '.join(columns)} has an empty or repeated name; name every column once"
        )
    return columns


def _spans(records: Iterator[list[str]], lines: _CountedLines, options: ReadOptions) -> Iterator[Span]:
    row, first_row, start, first_line = 0, 0, lines.position, records.line_num + 1  # type: ignore[attr-defined]
    for fields in records:
        row += bool(fields)
        if row - first_row >= options.span_rows or lines.position - start >= options.span_bytes:
            if row > first_row:
                yield Span(first_row, row - first_row, start, lines.position, lines.position - start, first_line)
            first_row, start, first_line = row, lines.position, records.line_num + 1  # type: ignore[attr-defined]
    if row > first_row:
        yield Span(first_row, row - first_row, start, lines.position, lines.position - start, first_line)


def _fault(fields: list[str], raw: bytes, columns: tuple[str, ...]) -> str | None:
    """Why a record is bad, or None. An unclosed quote swallows what follows, so it must not pass as a long field."""
    if raw.count(b'"') % 2 and raw.count(b"\n") > 1:
        return "has a quote that is never closed"
    if len(fields) != len(columns):
        return f"has {len(fields)} fields, the header has {len(columns)}"
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"is not UTF-8: byte {error.start + 1} is 0x{raw[error.start]:02x}"
    return None
