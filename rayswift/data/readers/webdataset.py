"""WebDataset: a tar archive whose files stand side by side in groups; the files of one name make a row.

`a/0001.jpg`, `a/0001.json`, `a/0001.txt` are a row: what is before the first dot of the file's name is the row's key,
what is behind the last dot says what the file is. Files without a dot, and hidden ones, belong to no row.
An object in `.json` gives columns, `.txt` the column `text`, `.cls` the column `label`; images, sounds and videos
become the lists `images`, `audios`, `videos` of `{"bytes", "path"}`, as Hugging Face's datasets has them, and replace
what the object calls so. Any other file is a column of its ending, as such an object.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rayswift.data.file_kinds import media_column, names_for
from rayswift.data.paths import file_name, open_file, read_range
from rayswift.data.readers.jsonl import parse_object
from rayswift.data.sources import FileIndex, RawRow, ReadOptions, Span, bad_row
from rayswift.data.tar import BLOCK, BrokenTar, HashedFile, HeldBytes, Member, members
from rayswift.errors import DataError
from rayswift.units import format_bytes

MAX_ROW_BYTES = 256 << 20
"""The largest row that is read into memory."""
MAX_ROW_FILES = 1000
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_TEXTS = {"txt": "text", "text": "text", "transcript": "text", "caption": "caption"}
_LABELS = ("cls", "class")


class Webdataset:
    """Reads `.tar`; a span is the byte range of whole groups, a row that is too large has one of its own."""

    extensions: ClassVar[tuple[str, ...]] = (".tar", ".tar.gz", ".tgz")

    def index(self, path: str, source: int, options: ReadOptions) -> FileIndex:
        """Byte ranges of the groups. Raises DataError for an archive that is broken, compressed, or not in order."""
        if not file_name(path).lower().endswith(".tar"):
            raise DataError(
                f"{path} is compressed, and rows in the middle of it cannot be reached; unpack it once with "
                "`gunzip` and name the .tar"
            )
        with open_file(path) as stream:
            content = HashedFile(stream)
            try:
                spans = tuple(_spans(_ordered(path, _groups(members(content))), options))
            except BrokenTar as error:
                raise DataError(f"{path} {error}; get the archive again, or pack it anew") from error
            content.drain()
        num_rows = sum(span.num_rows for span in spans)
        digest = content.digest.hexdigest()
        return FileIndex(path, source, "webdataset", num_rows, content.position, digest, spans, options=options)

    def read(self, index: FileIndex, span: Span) -> Iterator[RawRow]:
        """One dict, or BadRow, per group; an archive has no lines."""
        try:
            yield from _too_large(index, span) if span.num_bytes > MAX_ROW_BYTES else _rows(index, span)
        except BrokenTar as error:
            raise DataError(f"{index.path} changed after it was indexed: it {error}") from error


def _too_large(index: FileIndex, span: Span) -> Iterator[RawRow]:
    """The one row of a span that is not read, but for its name."""
    head = HeldBytes(read_range(index.path, span.start, min(span.stop, span.start + 8 * BLOCK)))
    name = next((member.name for member in members(head, whole=False)), "")
    reason = f"has {format_bytes(span.num_bytes)} in the archive, over the {format_bytes(MAX_ROW_BYTES)} of a row"
    yield span.first_row, None, bad_row(index, span.first_row, None, reason, name)


def _rows(index: FileIndex, span: Span) -> Iterator[RawRow]:
    content = read_range(index.path, span.start, span.stop)
    for row, group in enumerate(_groups(members(HeldBytes(content), whole=False)), span.first_row):
        found = _row(group, content)
        yield row, None, bad_row(index, row, None, found, group.key) if isinstance(found, str) else found


@dataclass(slots=True)
class _Group:
    """The files of a row. `files` are (what is behind the first dot, the member)."""

    key: str
    start: int
    stop: int
    files: list[tuple[str, Member]] = field(default_factory=list)


def _groups(found: Iterable[Member]) -> Iterator[_Group]:
    group: _Group | None = None
    for member in found:
        name = _NAME.fullmatch(member.name)
        if name is None:
            continue
        if group is not None and group.key != name[1]:
            yield group
            group = None
        if group is None:
            group = _Group(name[1], member.first, member.stop)
        if len(group.files) <= MAX_ROW_FILES:
            group.files.append((name[2].lower(), member))
        group.stop = member.stop
    if group is not None:
        yield group


def _ordered(path: str, groups: Iterable[_Group]) -> Iterator[_Group]:
    """The groups. Raises DataError where a key comes back: half a row would be trained on as if it were whole."""
    seen: set[int] = set()
    for group in groups:
        if hash(group.key) in seen:
            raise DataError(
                f"{path} has the files of {group.key} in several places, not side by side; pack it anew with "
                "`tar --sort=name`"
            )
        seen.add(hash(group.key))
        yield group


def _spans(groups: Iterable[_Group], options: ReadOptions) -> Iterator[Span]:
    first_row = row = start = stop = 0
    for group in groups:
        if row > first_row and (row - first_row == options.span_rows or group.stop - start > options.span_bytes):
            yield Span(first_row, row - first_row, start, stop, stop - start)
            first_row = row
        start = group.start if row == first_row else start
        row, stop = row + 1, group.stop
    if row > first_row:
        yield Span(first_row, row - first_row, start, stop, stop - start)


def _row(group: _Group, content: bytes) -> dict[str, Any] | str:
    """The row of a group, or why it is none."""
    if len(group.files) > MAX_ROW_FILES:
        return f"has more than {MAX_ROW_FILES} files"
    row: dict[str, Any] = {}
    media: dict[str, list[dict[str, Any]]] = {}
    for ending, member in group.files:
        raw = content[member.start : member.start + member.size]
        column = media_column(member.name)
        if column is not None:
            media.setdefault(column, []).append({"bytes": raw, "path": member.name})
            continue
        columns = _columns(ending.rpartition(".")[2], member, raw)
        if isinstance(columns, str):
            return f"has {member.name}, which {columns}"
        if twice := sorted(columns.keys() & row.keys()):
            return f"has `{twice[0]}` in {member.name} and in another file"
        row |= columns
    named = {name for column in media for name in names_for(column)}
    return {"__key__": group.key} | {name: value for name, value in row.items() if name not in named} | media


def _columns(ending: str, member: Member, raw: bytes) -> dict[str, Any] | str:
    """The columns that a file gives, or what is wrong with it."""
    if ending in ("json", "jsn"):
        return parse_object(raw)
    if ending not in _TEXTS and ending not in _LABELS:
        return {ending: {"bytes": raw, "path": member.name}}
    try:
        text = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return f"is not UTF-8: byte {error.start + 1} is 0x{raw[error.start]:02x}"
    if ending in _TEXTS:
        return {_TEXTS[ending]: text}
    return {"label": int(text) if text.isdecimal() and len(text) < 19 else text}
