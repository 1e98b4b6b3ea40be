"""A JSON file that holds one list of objects. A `.json` file with an object per line is read as JSON lines.

A file that is not JSON has no rows to be told apart, so it is an error of the whole file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import ClassVar

from rayswift.data.lines import BOM
from rayswift.data.paths import open_file, read_range
from rayswift.data.readers.jsonl import Jsonl, parse_object
from rayswift.data.sources import FileIndex, RawRow, ReadOptions, Span, bad_row
from rayswift.errors import DataError

_BETWEEN = re.compile(r"[ \t\r\n,]*")
_SPACE = re.compile(r"[ \t\r\n]*")


class Json:
    """Reads `.json`; spans are byte ranges of whole elements."""

    extensions: ClassVar[tuple[str, ...]] = (".json",)

    def index(self, path: str, source: int, options: ReadOptions) -> FileIndex:
        """Byte ranges of the elements of the list. Raises DataError with line and column when it is not one."""
        with open_file(path) as stream:
            raw = stream.read()
        start = len(BOM) if raw.startswith(BOM) else 0
        head = raw[start : start + 65536].lstrip()
        if head.startswith(b"{"):
            return self._index_objects(path, source, options, head)
        spans = tuple(_spans(path, raw, start, options))
        num_rows = sum(span.num_rows for span in spans)
        digest = hashlib.sha256(raw).hexdigest()
        return FileIndex(path, source, "json", num_rows, len(raw), digest, spans, options=options)

    def read(self, index: FileIndex, span: Span) -> Iterator[RawRow]:
        """One object, or BadRow, per element; the line is where the element starts."""
        raw = read_range(index.path, span.start, span.stop)
        text, line, seen = raw.decode("latin-1"), span.first_line or 1, 0
        for row, (start, stop) in enumerate(_elements(text, 0, len(text)), span.first_row):
            line, seen = line + text.count("\n", seen, start), start
            parsed = parse_object(raw[start:stop])
            if isinstance(parsed, str):
                yield row, line, bad_row(index, row, line, parsed, raw[start:stop].decode("utf-8", "replace"))
            else:
                yield row, line, parsed

    def _index_objects(self, path: str, source: int, options: ReadOptions, head: bytes) -> FileIndex:
        """An object per line is fine; one object over several lines is no list of rows."""
        if isinstance(parse_object(head.split(b"\n", 1)[0]), str) and b"\n" in head:
            raise DataError(
                f"{path} is one JSON object, not a list of rows; write `[{{...}}, ...]` or an object per line"
            )
        return Jsonl().index(path, source, options)


def _spans(path: str, raw: bytes, start: int, options: ReadOptions) -> Iterator[Span]:
    """Decoding as latin-1 makes an index into the text an index into the bytes; JSON's own syntax is ASCII."""
    text = raw.decode("latin-1")
    begin = _SPACE.match(text, start).end()  # type: ignore[union-attr]
    if begin == len(text):
        return
    if text[begin] != "[":
        raise _broken(path, raw, begin, "expected a list of rows")
    first_row, line, seen = 0, 1, 0
    group: list[tuple[int, int]] = []
    for element in _checked_elements(path, raw, text, begin + 1):
        if group and (len(group) == options.span_rows or element[1] - group[0][0] > options.span_bytes):
            line, seen = line + text.count("\n", seen, group[0][0]), group[0][0]
            yield _span(first_row, group, line)
            first_row, group = first_row + len(group), []
        group.append(element)
    if group:
        yield _span(first_row, group, line + text.count("\n", seen, group[0][0]))


def _span(first_row: int, group: list[tuple[int, int]], line: int) -> Span:
    start, stop = group[0][0], group[-1][1]
    return Span(first_row, len(group), start, stop, stop - start, line)


def _elements(text: str, position: int, stop: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of each value in comma-separated values that were found well-formed before."""
    decoder = json.JSONDecoder()
    while (position := _BETWEEN.match(text, position).end()) < stop:  # type: ignore[union-attr]
        _, end = decoder.raw_decode(text, position)
        yield position, end
        position = end


def _checked_elements(path: str, raw: bytes, text: str, position: int) -> Iterator[tuple[int, int]]:
    """As `_elements` up to the closing bracket. Raises DataError where the file is not a JSON list."""
    decoder, expect_value = json.JSONDecoder(), False
    while True:
        position = _SPACE.match(text, position).end()  # type: ignore[union-attr]
        if text[position : position + 1] == "]" and not expect_value:
            break
        try:
            _, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _broken(path, raw, error.pos, error.msg) from error
        except (ValueError, RecursionError) as error:
            raise _broken(path, raw, position, str(error)) from error
        yield position, end
        position = _SPACE.match(text, end).end()  # type: ignore[union-attr]
        separator = text[position : position + 1]
        if separator not in (",", "]") or not separator:
            raise _broken(path, raw, position, "expected ',' or ']'")
        expect_value = separator == ","
        position += expect_value
    position = _SPACE.match(text, position + 1).end()  # type: ignore[union-attr]
    if position < len(text):
        raise _broken(path, raw, position, "extra data after the list")


def _broken(path: str, raw: bytes, position: int, rule: str) -> DataError:
    line = raw.count(b"\n", 0, position) + 1
    start = raw.rfind(b"\n", 0, position) + 1
    column = len(raw[start:position].decode("utf-8", "replace")) + 1
    return DataError(
        f"{path}:{line}: is not JSON: {rule} at column {column}; repair the file, or write one object per line "
        "(.jsonl), where a broken line costs one row"
    )
