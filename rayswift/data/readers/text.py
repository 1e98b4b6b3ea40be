"""Plain text: a row is a line, a paragraph (blank lines between), or the whole file, by `text_unit`."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import ClassVar

from rayswift.data.lines import BOM, scan_lines, split_lines
from rayswift.data.paths import open_file, read_range
from rayswift.data.sources import FileIndex, RawRow, ReadOptions, Span, bad_row


class Text:
    """Reads `.txt` and `.md` into rows with the one column `text`; spans are byte ranges."""

    extensions: ClassVar[tuple[str, ...]] = (".txt", ".md")

    def index(self, path: str, source: int, options: ReadOptions) -> FileIndex:
        """Byte ranges of the units of a file; blank units are no rows."""
        with open_file(path) as stream:
            if options.text_unit == "line":
                scan = scan_lines(stream, options)
                size, digest, spans = scan.size_bytes, scan.sha256, scan.spans
            else:
                raw = stream.read()
                size, digest = len(raw), hashlib.sha256(raw).hexdigest()
                document = options.text_unit == "document"
                spans = tuple(_document(raw) if document else _paragraph_spans(raw, options))
        num_rows = sum(span.num_rows for span in spans)
        return FileIndex(path, source, "text", num_rows, size, digest, spans, ("text",), options)

    def read(self, index: FileIndex, span: Span) -> Iterator[RawRow]:
        """`{"text": ...}`, or BadRow where the bytes are not UTF-8, per unit."""
        data = read_range(index.path, span.start, span.stop)
        first_line = span.first_line or 1
        for row, (line, raw) in enumerate(_units(data, first_line, index.options), span.first_row):
            try:
                yield row, line, {"text": raw.decode("utf-8")}
            except UnicodeDecodeError as error:
                reason = f"is not UTF-8: byte {error.start + 1} is 0x{raw[error.start]:02x}"
                yield row, line, bad_row(index, row, line, reason, raw[:400].decode("utf-8", "replace"))


def _units(data: bytes, first_line: int, options: ReadOptions) -> Iterator[tuple[int, bytes]]:
    if options.text_unit == "line":
        return split_lines(data, first_line)
    if options.text_unit == "document":
        return iter([(first_line, data)])
    return ((first_line + line, data[start:stop]) for start, stop, line in _paragraphs(data, 0))


def _document(raw: bytes) -> Iterator[Span]:
    start = len(BOM) if raw.startswith(BOM) else 0
    if raw[start:].strip():
        yield Span(0, 1, start, len(raw), len(raw) - start, 1)


def _paragraph_spans(raw: bytes, options: ReadOptions) -> Iterator[Span]:
    group: list[tuple[int, int, int]] = []
    first_row = 0
    for paragraph in _paragraphs(raw, len(BOM) if raw.startswith(BOM) else 0):
        if group and (len(group) == options.span_rows or paragraph[1] - group[0][0] > options.span_bytes):
            yield _span(first_row, group)
            first_row, group = first_row + len(group), []
        group.append(paragraph)
    if group:
        yield _span(first_row, group)


def _span(first_row: int, group: list[tuple[int, int, int]]) -> Span:
    start, stop = group[0][0], group[-1][1]
    return Span(first_row, len(group), start, stop, stop - start, group[0][2] + 1)


def _paragraphs(raw: bytes, position: int) -> Iterator[tuple[int, int, int]]:
    """[start, stop) without the last newline, and the 0-based first line, of each run of non-blank lines."""
    start: int | None = None
    first_line = stop = 0
    for line, content in enumerate(io.BytesIO(raw[position:])):
        if content.strip():
            if start is None:
                start, first_line = position, line
            stop = position + len(content.rstrip(b"\r\n"))
        elif start is not None:
            yield start, stop, first_line
            start = None
        position += len(content)
    if start is not None:
        yield start, stop, first_line
