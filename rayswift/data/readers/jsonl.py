"""JSON lines: one object per line, blank lines skipped.

A line that is not JSON, or not an object, is a bad row with its line and column; the lines around it are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, ClassVar

from rayswift.data.lines import scan_lines, split_lines
from rayswift.data.paths import open_file, read_range
from rayswift.data.sources import FileIndex, RawRow, ReadOptions, Span, bad_row


class Jsonl:
    """Reads `.jsonl` and `.ndjson`; spans are byte ranges."""

    extensions: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson")

    def index(self, path: str, source: int, options: ReadOptions) -> FileIndex:
        """Byte ranges of the lines of a file."""
        with open_file(path) as stream:
            scan = scan_lines(stream, options)
        return FileIndex(
            path, source, "jsonl", scan.num_rows, scan.size_bytes, scan.sha256, scan.spans, options=options
        )

    def read(self, index: FileIndex, span: Span) -> Iterator[RawRow]:
        """One object, or BadRow, per non-blank line."""
        data = read_range(index.path, span.start, span.stop)
        for row, (line, raw) in enumerate(split_lines(data, span.first_line or 1), span.first_row):
            parsed = parse_object(raw)
            if isinstance(parsed, str):
                yield row, line, bad_row(index, row, line, parsed, raw.decode("utf-8", "replace"))
            else:
                yield row, line, parsed


def parse_object(raw: bytes) -> dict[str, Any] | str:
    """The object that some bytes spell, or why they do not."""
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"is not UTF-8: byte {error.start + 1} is 0x{raw[error.start]:02x}"
    except json.JSONDecodeError as error:
        return f"is not JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        return f"is not JSON that can be read: {error}"
    return value if isinstance(value, dict) else f"is a JSON {_kind(value)}, not an object"


def _kind(value: object) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names[type(value)]
