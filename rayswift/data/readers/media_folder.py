"""A folder of images, sounds or videos, where the folder that a file lies in is its label: `digits/7/0001.png`.

The folder is one file of the stream: its rows are its media files in the order of their paths, and its hash is that of
all their names and bytes. A folder that has files of rows, a `metadata.jsonl` among them, is those files instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, ClassVar

from rayswift.data.file_kinds import media_column
from rayswift.data.folders import label_of, media_files
from rayswift.data.paths import open_file
from rayswift.data.sources import FileIndex, RawRow, ReadOptions, Span, bad_row
from rayswift.errors import DataError

_BLOCK_BYTES = 1 << 20


class MediaFolder:
    """Reads what ends with a slash; a span is a range of file numbers, and its bytes are those of the files."""

    extensions: ClassVar[tuple[str, ...]] = ("/",)

    def index(self, path: str, source: int, options: ReadOptions) -> FileIndex:
        """Ranges of the files, each of which is read once. Raises DataError for files that no label tells apart."""
        files = media_files(path)
        if len({label_of(name) for name, _ in files} - {None}) < 2:
            raise DataError(
                f"{path} has images, sounds or videos, and nothing to answer of them: put them into a folder for each "
                "label, or describe them in a metadata.jsonl with `file_name` and `text`"
            )
        digest = hashlib.sha256()
        for name, size in files:
            digest.update(f"{name}\0{size}\0".encode())
            with open_file(path + name) as stream:
                while block := stream.read(_BLOCK_BYTES):
                    digest.update(block)
        spans, size_bytes = tuple(_spans(files, options)), sum(size for _, size in files)
        return FileIndex(
            path, source, "media_folder", len(files), size_bytes, digest.hexdigest(), spans, options=options
        )

    def read(self, index: FileIndex, span: Span) -> Iterator[RawRow]:
        """The path below the folder, in a list of its kind, and the label of each file."""
        files = _listed(index.path, index.sha256)[span.start : span.stop]
        if len(files) != span.stop - span.start or sum(size for _, size in files) != span.num_bytes:
            raise DataError(f"{index.path} changed after it was indexed; leave data files alone while a run reads them")
        for row, (name, _) in enumerate(files, span.first_row):
            yield row, None, _row(index, row, name)


def _row(index: FileIndex, row: int, name: str) -> Any:
    label = label_of(name)
    if label is None:
        return bad_row(index, row, None, "lies in no folder that would be its label", name)
    return {str(media_column(name)): [name], "label": label}


@lru_cache(maxsize=8)
def _listed(path: str, sha256: str) -> list[tuple[str, int]]:
    """The files of a folder, listed once per process for each state it was indexed in."""
    return media_files(path)


def _spans(files: list[tuple[str, int]], options: ReadOptions) -> Iterator[Span]:
    start = size_bytes = 0
    for number, (_, size) in enumerate(files):
        full = number - start == options.span_rows or size_bytes + size > options.span_bytes
        if number > start and full:
            yield Span(start, number - start, start, number, size_bytes)
            start, size_bytes = number, 0
        size_bytes += size
    if len(files) > start:
        yield Span(start, len(files) - start, start, len(files), size_bytes)
