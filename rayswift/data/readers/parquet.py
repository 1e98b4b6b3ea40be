"""Parquet: spans are row ranges of a row group, read through pyarrow.

A row group is decoded whole, so decoded groups are kept per process up to 256 MiB: shuffled spans of a
group would otherwise decode it again and again.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from rayswift.data.paths import open_file
from rayswift.data.sources import FileIndex, RawRow, ReadOptions, Span
from rayswift.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_CACHE_BYTES = 256 << 20
_groups: OrderedDict[tuple[str, str, int], pa.Table] = OrderedDict()


class Parquet:
    """Reads `.parquet`; a span's `start` is its row group, its `stop` the first row within the group."""

    extensions: ClassVar[tuple[str, ...]] = (".parquet",)

    def index(self, path: str, source: int, options: ReadOptions) -> FileIndex:
        """Row ranges of the row groups. Raises DataError when the file is not Parquet."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with open_file(path) as stream:
            digest = hashlib.sha256()
            while block := stream.read(8 << 20):
                digest.update(block)
            size = stream.tell()
            try:
                metadata = pq.ParquetFile(stream).metadata
            except (pa.ArrowInvalid, OSError) as error:
                raise DataError(f"{path} is not a Parquet file that can be read: {error}; write it again") from error
            spans = tuple(_spans(metadata, options))
            columns = tuple(metadata.schema.to_arrow_schema().names)
        return FileIndex(path, source, "parquet", metadata.num_rows, size, digest.hexdigest(), spans, columns, options)

    def read(self, index: FileIndex, span: Span) -> Iterator[RawRow]:
        """One dict per row; Parquet has no lines."""
        rows = _row_group(index, span.start).slice(span.stop, span.num_rows).to_pylist()
        for row, values in enumerate(rows, span.first_row):
            yield row, None, values


def _spans(metadata: object, options: ReadOptions) -> Iterator[Span]:
    first_row = 0
    for group in range(metadata.num_row_groups):  # type: ignore[attr-defined]
        info = metadata.row_group(group)  # type: ignore[attr-defined]
        row_bytes = max(1, info.total_byte_size // max(1, info.num_rows))
        step = max(1, min(options.span_rows, options.span_bytes // row_bytes))
        for offset in range(0, info.num_rows, step):
            num_rows = min(step, info.num_rows - offset)
            yield Span(first_row + offset, num_rows, group, offset, num_rows * row_bytes)
        first_row += info.num_rows


def _row_group(index: FileIndex, group: int) -> pa.Table:
    import pyarrow.parquet as pq

    key = (index.path, index.sha256, group)
    if key in _groups:
        _groups.move_to_end(key)
        return _groups[key]
    with open_file(index.path) as stream:
        table = pq.ParquetFile(stream).read_row_group(group)
    _groups[key] = table
    while len(_groups) > 1 and sum(kept.nbytes for kept in _groups.values()) > _CACHE_BYTES:
        _groups.popitem(last=False)
    return table
