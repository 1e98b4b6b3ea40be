"""Where rows come from: sources -> indexed files -> raw rows.

Knows files, spans and the Reader protocol; what a row means is known by `formats/`, how a kind of file is
cut into spans by `readers/`, where the bytes of a file lie by `paths`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import Any, ClassVar, Literal, Protocol, cast

from rayswift import plugins
from rayswift.config.job import DataSource, is_hub_dataset
from rayswift.data.folders import is_metadata, media_files, with_media
from rayswift.data.hub_copies import check_copy, is_pinned_file
from rayswift.data.hub_sources import hub_files, limit_of
from rayswift.data.paths import closest, file_name, find, folder_named
from rayswift.data.types import BadRow
from rayswift.errors import ConfigError

RawRow = tuple[int, int | None, dict[str, Any] | BadRow]
"""Row number in the file (from 0), 1-based line where the kind of file has lines, and the row or why it is bad."""
_TEXTS = (".txt", ".md")


@dataclass(frozen=True)
class ReadOptions:
    """How a file is cut into rows and spans. A span holds at most `span_rows` rows and about `span_bytes` bytes."""

    text_unit: Literal["line", "paragraph", "document"] = "line"
    span_rows: int = 256
    span_bytes: int = 4 << 20


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive rows that are read together. `start`, `stop` mean what the file's reader makes of them."""

    first_row: int
    num_rows: int
    start: int
    stop: int
    num_bytes: int
    first_line: int | None = None


@dataclass(frozen=True)
class FileIndex:
    """One file and where its rows lie. Rows are numbered from 0 in file order; `spans` cover them without gaps."""

    path: str
    source: int
    reader: str
    num_rows: int
    size_bytes: int
    sha256: str
    spans: tuple[Span, ...]
    columns: tuple[str, ...] = ()
    options: ReadOptions = ReadOptions()

    def limited(self, num_rows: int) -> FileIndex:
        """This index with only the first `num_rows` rows."""
        spans = tuple(
            span if span.first_row + span.num_rows <= num_rows else replace(span, num_rows=num_rows - span.first_row)
            for span in self.spans
            if span.first_row < num_rows
        )
        return replace(self, num_rows=min(self.num_rows, num_rows), spans=spans)


class Reader(Protocol):
    """One kind of file. A row that cannot be read is yielded as a BadRow; only a hopeless file raises DataError."""

    extensions: ClassVar[tuple[str, ...]]

    def index(self, path: str, source: int, options: ReadOptions) -> FileIndex:
        """Where the rows of the file lie, found in one pass that also hashes the file."""
        ...

    def read(self, index: FileIndex, span: Span) -> Iterator[RawRow]:
        """The rows of one span, in file order; may yield more than `span.num_rows`, which the caller cuts off."""
        ...


def resolve(source: DataSource, index: int, *, path: str = "data.train") -> list[str]:
    """The sorted absolute paths or URLs of a source's files. Raises ConfigError when there is none.

    A folder stands for the data files below it that a reader knows, see `paths.find`; one that has media only is itself
    what is read, and its name ends with a slash. The files of a dataset on a hub are URLs of one commit.
    """
    place = place_of(path, index, "path")
    if is_hub_dataset(source.path):
        return hub_files(source, {ending: kind for ending, kind in _extensions().items() if ending != "/"}, place=place)
    try:
        found = find(source.path, tuple(_extensions()))
        folder = folder_named(source.path) if all(file.endswith(_TEXTS) for file in found) else None
        media = folder is not None and media_files(folder)
    except Exception as error:  # every fsspec backend raises its own types; none may reach the user as a traceback
        raise ConfigError(
            f"cannot be opened: {_one_line(error)}", path=place, value=source.path, fix=_install_hint(error)
        ) from error
    if folder is not None and media:
        if found:
            raise ConfigError(
                f"has texts beside images, sounds or videos, such as {media[0][0]}: which are the rows is not clear",
                path=place, value=source.path, fix="write `/*.txt` behind the folder, or move the texts out of it",
            )  # fmt: skip
        return [folder]
    if not found:
        if folder is not None:
            known = ", ".join(sorted(ending for ending in _extensions() if ending != "/"))
            raise ConfigError("is a folder without data", path=place, value=source.path, fix=f"data ends with {known}")
        raise ConfigError(_missing_rule(source.path), path=place, value=source.path, fix=closest(source.path))
    return found


def place_of(path: str, number: int, key: str) -> str:
    """What an error names: `data.train.0.path`, or the option of a command, which has one source, as it is typed."""
    return path if path.startswith("--") else f"{path}.{number}.{key}"


def index_sources(
    sources: Sequence[DataSource], *, path: str = "data.train", span_rows: int = 256
) -> tuple[FileIndex, ...]:
    """The indexes of all files of all sources, in order; `limit` counts over the files of a source.

    Raises ConfigError for a path that leads nowhere or a kind of file nobody reads, DataError for a broken file.
    """
    indexes: list[FileIndex] = []
    for number, source in enumerate(sources):
        left = limit_of(source)
        for file in resolve(source, number, path=path):
            if left == 0:
                break
            index = _index_file(file, source, number, path, span_rows)
            if left is not None:
                index = index.limited(left)
                left -= index.num_rows
            indexes.append(index)
    return tuple(indexes)


def read_rows(index: FileIndex, span: Span) -> Iterator[RawRow]:
    """The rows of one span, as RawRow. Raises DataError when the file changed after it was indexed."""
    rows = islice(_reader(index.reader).read(index, span), span.num_rows)
    return map(_described, rows) if is_metadata(index.path) else rows


def _described(raw: RawRow) -> RawRow:
    row, line, value = raw
    return row, line, value if isinstance(value, BadRow) else with_media(value)


def bad_row(index: FileIndex, row: int, line: int | None, reason: str, content: str = "") -> BadRow:
    """A BadRow of this file, with the content cut to what a person needs to recognise the row."""
    excerpt = content[:300].encode("utf-8", "replace").decode()
    return BadRow(file=index.path, row=row, line=line, reason=reason, content=excerpt, sha256=index.sha256)


def _index_file(file: str, source: DataSource, number: int, path: str, span_rows: int) -> FileIndex:
    options = ReadOptions(text_unit=source.text_unit, span_rows=span_rows)
    name = _reader_name(file, place_of(path, number, "path"))
    try:
        index = _reader(name).index(file, number, options)
    except OSError as error:
        raise ConfigError(
            f"cannot be read: {_one_line(error)}", path=place_of(path, number, "path"), value=file
        ) from error
    if is_pinned_file(file):
        check_copy(file, index.sha256)
    return index


def _reader_name(file: str, place: str) -> str:
    known = _extensions()
    for extension, name in known.items():
        if file_name(file).lower().endswith(extension):
            return name
    raise ConfigError(
        "has no extension that a reader knows",
        path=place,
        value=file,
        fix=f"use one of {', '.join(sorted(known.keys() - {'/'}))}",
    )


@cache
def _extensions() -> dict[str, str]:
    names = plugins.names("data.readers")
    return {extension: name for name in names for extension in plugins.load("data.readers", name).extensions}


@cache
def _reader(name: str) -> Reader:
    return cast(Reader, plugins.load("data.readers", name)())


def _missing_rule(path: str) -> str:
    return "matches no file" if any(mark in path for mark in "*?[") else "does not exist"


def _install_hint(error: Exception) -> str | None:
    return (
        "install the fsspec backend of this URL in the environment of the job"
        if isinstance(error, ImportError)
        else None
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
