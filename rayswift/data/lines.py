"""Lines of bytes: where the non-blank ones lie, and how they are read back.

Knows newlines, byte order marks and hashing; nothing of what a line contains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np

from rayswift.data.sources import ReadOptions, Span

BOM = b"\xef\xbb\xbf"
_BLOCK_BYTES = 8 << 20
_BLANK_BYTES = np.frombuffer(b" \t\r\n\x0b\x0c", dtype=np.uint8)


@dataclass(frozen=True)
class LineScan:
    """What one pass over a file of lines found; every non-blank line is a row."""

    num_rows: int
    size_bytes: int
    sha256: str
    spans: tuple[Span, ...]


def scan_lines(stream: IO[bytes], options: ReadOptions, block_bytes: int = _BLOCK_BYTES) -> LineScan:
    """The spans of the non-blank lines of a stream. Memory is one block; a span never crosses a block's end."""
    digest, spans = hashlib.sha256(), list[Span]()
    position, line, row, size = 0, 1, 0, 0
    carry = b""
    while True:
        block = stream.read(block_bytes)
        digest.update(block)
        size += len(block)
        data = carry + block
        cut = data.rfind(b"\n") + 1 if block else len(data)
        whole, carry = data[:cut], data[cut:]
        if whole:
            starts, ends, lines, num_lines = _rows_of(whole, skip=len(BOM) if _has_bom(whole, position) else 0)
            for first, last in _groups(starts, ends, options):
                start, stop = position + int(starts[first]), position + int(ends[last - 1])
                spans.append(Span(row + first, last - first, start, stop, stop - start, line + int(lines[first])))
            row, line, position = row + len(starts), line + num_lines, position + cut
        if not block:
            return LineScan(row, size, digest.hexdigest(), tuple(spans))


def split_lines(data: bytes, first_line: int) -> Iterator[tuple[int, bytes]]:
    """(1-based line, bytes without newline) of the non-blank lines of a span."""
    for line, raw in enumerate(data.split(b"\n"), first_line):
        if raw.strip():
            yield line, raw.removesuffix(b"\r")


def _has_bom(whole: bytes, position: int) -> bool:
    return position == 0 and whole.startswith(BOM)


def _rows_of(whole: bytes, skip: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Starts, ends (after the newline) and 0-based lines of the non-blank lines, and the number of all lines."""
    array = np.frombuffer(whole, dtype=np.uint8)
    ends = np.flatnonzero(array == 10) + 1
    if not whole.endswith(b"\n"):
        ends = np.append(ends, len(whole))
    starts = np.concatenate([[skip], ends[:-1]])
    keep = np.ones(len(starts), dtype=bool)
    inside = np.minimum(starts, len(whole) - 1)  # a file of a lone byte order mark has an empty first line
    for index in np.flatnonzero(np.isin(array[inside], _BLANK_BYTES) | (starts >= ends)):
        keep[index] = bool(whole[starts[index] : ends[index]].strip())
    lines = np.flatnonzero(keep)
    return starts[keep], ends[keep], lines, len(starts)


def _groups(starts: np.ndarray, ends: np.ndarray, options: ReadOptions) -> Iterator[tuple[int, int]]:
    """[first, last) of the rows that share a span."""
    first = 0
    while first < len(starts):
        within = int(np.searchsorted(ends, starts[first] + options.span_bytes, side="right"))
        last = max(first + 1, min(first + options.span_rows, within))
        yield first, last
        first = last
