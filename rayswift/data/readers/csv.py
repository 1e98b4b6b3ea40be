"""CSV and TSV with a header line; quoted fields may hold newlines. Every value is text.

Which lines make a record, and what a broken quote costs, is known by `rayswift.data.records`.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import IO, Any, ClassVar

from rayswift.data.lines import BOM
from rayswift.data.paths import file_name, open_file, read_range
from rayswift.data.records import Record, records
from rayswift.data.sources import FileIndex, RawRow, ReadOptions, Span, bad_row
from rayswift.data.types import BadRow
from rayswift.errors import DataError


class Csv:
    """Reads `.csv` and `.tsv`; spans are byte ranges of whole records."""

    extensions: ClassVar[tuple[str, ...]] = (".csv", ".tsv")

    def index(self, path: str, source: int, options: ReadOptions) -> FileIndex:
        """Byte ranges of the records after the header. Raises DataError for a header that names no columns."""
        with open_file(path) as stream:
            lines = _HashedLines(stream)
            found = records(lines, _delimiter(path), None)
            header, position, line = _header(found)
            columns = _columns(path, header)
            spans = tuple(_spans(found, position + lines.bom_bytes, line, options))
        num_rows = sum(span.num_rows for span in spans)
        digest = lines.digest.hexdigest()
        return FileIndex(path, source, "csv", num_rows, lines.size, digest, spans, columns, options)

    def read(self, index: FileIndex, span: Span) -> Iterator[RawRow]:
        """One dict of texts, or BadRow, per record; the line is the record's first."""
        lines = io.BytesIO(read_range(index.path, span.start, span.stop))  # splits at newlines only, as the file did
        row, line = span.first_row, span.first_line or 1
        for record in records(lines, _delimiter(index.path), len(index.columns)):
            if _is_row(record):
                yield row, line, _row(index, record, row, line)
                row += 1
            line += record.raw.count(b"\n")


class _HashedLines:
    """The lines of a file without its byte order mark, hashed and counted on the way."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.size = self.bom_bytes = 0

    def __iter__(self) -> _HashedLines:
        return self

    def __next__(self) -> bytes:
        raw = next(self._stream)
        if self.size == 0 and raw.startswith(BOM):
            self.bom_bytes = len(BOM)
        self.digest.update(raw)
        self.size += len(raw)
        return raw.removeprefix(BOM) if self.size == len(raw) else raw


def _delimiter(path: str) -> str:
    return "\t" if file_name(path).lower().endswith(".tsv") else ","


def _is_row(record: Record) -> bool:
    """Anything but a blank line."""
    return bool(record.fields) or record.fault is not None


def _header(found: Iterator[Record]) -> tuple[Record | None, int, int]:
    """The first record that is no blank line, None in an empty file; where it ends, and the line behind it."""
    position, line = 0, 1
    for record in found:
        position, line = position + len(record.raw), line + record.raw.count(b"\n")
        if _is_row(record):
            return record, position, line
    return None, position, line


def _columns(path: str, header: Record | None) -> tuple[str, ...]:
    """The names of the columns. The first may be empty: so pandas writes the index, which is no data."""
    if header is None:
        return ()
    if header.fault:
        raise DataError(f"{path}:1: the header {header.fault}; repair the line")
    columns = tuple(name.encode("latin-1").decode("utf-8", "replace").strip() for name in header.fields)
    if len(set(columns)) != len(columns) or not all(columns[1:]) or not any(columns):
        raise DataError(
            f"{path}:1: the header {', '.join(columns)} has an empty or repeated name; name every column once"
        )
    return columns


def _spans(found: Iterator[Record], position: int, line: int, options: ReadOptions) -> Iterator[Span]:
    row, first_row, start, first_line = 0, 0, position, line
    for record in found:
        row += _is_row(record)
        position, line = position + len(record.raw), line + record.raw.count(b"\n")
        full = row - first_row >= options.span_rows or position - start >= options.span_bytes
        if full and record.in_step:
            if row > first_row:
                yield Span(first_row, row - first_row, start, position, position - start, first_line)
            first_row, start, first_line = row, position, line
    if row > first_row:
        yield Span(first_row, row - first_row, start, position, position - start, first_line)


def _row(index: FileIndex, record: Record, row: int, line: int) -> dict[str, Any] | BadRow:
    try:
        record.raw.decode("utf-8")
        reason = record.fault
    except UnicodeDecodeError as error:
        reason = record.fault or f"is not UTF-8: byte {error.start + 1} is 0x{record.raw[error.start]:02x}"
    if reason:
        return bad_row(index, row, line, reason, record.raw.decode("utf-8", "replace"))
    values = (field.encode("latin-1").decode("utf-8") for field in record.fields)
    return {name: value for name, value in zip(index.columns, values, strict=True) if name}
