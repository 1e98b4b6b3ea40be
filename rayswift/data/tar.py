"""The members of a tar archive, in one pass over its bytes and in bounded memory.

Knows headers: ustar, GNU's long names, and pax records of names and sizes. Python's tarfile would read an extended
header of any size into memory, and seeks back and forth; here a header is believed only as far as the file goes.
Nothing is ever extracted: a name is a name, wherever it points.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Protocol

BLOCK = 512
_READ_BYTES = 1 << 20
_MAX_EXTENDED_BYTES = 1 << 20
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
             tarfile.GNUTYPE_LONGLINK)  # fmt: skip


class BrokenTar(ValueError):
    """What is wrong with an archive, as the end of a sentence that names it."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive: its name, where its headers and its content begin, and the size of the content."""

    name: str
    first: int
    start: int
    size: int

    @property
    def stop(self) -> int:
        """Where the next member begins."""
        return self.start + padded(self.size)


class Bytes(Protocol):
    """Bytes that are gone through once. `position` counts from the start of what is read."""

    position: int

    def take(self, count: int) -> bytes:
        """The next `count` bytes, fewer only at the end."""
        ...

    def skip(self, count: int) -> int:
        """How many of the next `count` bytes there are, which are passed over."""
        ...


class HashedFile:
    """The bytes of a file, hashed on the way."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.position = 0

    def take(self, count: int) -> bytes:
        """As `Bytes.take`."""
        parts = []
        while count and (block := self._stream.read(count)):
            parts.append(block)
            self.digest.update(block)
            self.position += len(block)
            count -= len(block)
        return b"".join(parts)

    def skip(self, count: int) -> int:
        """As `Bytes.skip`, a block at a time."""
        before = self.position
        while count and (block := self.take(min(count, _READ_BYTES))):
            count -= len(block)
        return self.position - before

    def drain(self) -> None:
        """Goes to the end."""
        while self.take(_READ_BYTES):
            pass


class HeldBytes:
    """The bytes of a part of an archive that is in memory."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.position = 0

    def take(self, count: int) -> bytes:
        """As `Bytes.take`."""
        found = self._content[self.position : self.position + count]
        self.position += len(found)
        return found

    def skip(self, count: int) -> int:
        """As `Bytes.skip`."""
        count = min(count, len(self._content) - self.position)
        self.position += count
        return count


def members(source: Bytes, *, whole: bool = True) -> Iterator[Member]:
    """The files of an archive, or of a part that begins and ends with a member if not `whole`. Raises BrokenTar."""
    first: int | None = None
    extended: dict[str, str] = {}
    while (header := _header(source, whole)) is not None:
        at = source.position - BLOCK
        first = at if first is None else first
        if header.type in _EXTENDED:
            extended |= _extended(source, header, at)
            continue
        name, size = extended.get("path", header.name), _size(extended.get("size"), header, at)
        if header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in extended):
            raise BrokenTar(f"has the sparse file {name}, which is not read; pack it without --sparse")
        if header.isreg() or header.type not in tarfile.SUPPORTED_TYPES:
            yield Member(name, first, source.position, size)
            if (there := source.skip(padded(size))) < padded(size):
                raise BrokenTar(f"says that {name} has {size} bytes, and ends after {there} of them")
        first, extended = None, {}


def padded(size: int) -> int:
    """The bytes that a content of this size takes in an archive."""
    return -(-size // BLOCK) * BLOCK


def _header(source: Bytes, whole: bool) -> tarfile.TarInfo | None:
    """The next header, None at the end mark."""
    raw = source.take(BLOCK)
    if raw == bytes(BLOCK) or (not raw and not whole):
        return None
    if len(raw) < BLOCK:
        raise BrokenTar("ends without the mark at the end of an archive: a part of it is missing")
    try:
        return tarfile.TarInfo.frombuf(raw, "utf-8", "replace")
    except tarfile.HeaderError as error:
        raise BrokenTar(f"has no header of a file at byte {source.position - BLOCK} ({error})") from error


def _extended(source: Bytes, header: tarfile.TarInfo, at: int) -> dict[str, str]:
    """What an extended header says of the next member; one that is for all members names and sizes none."""
    if not 0 <= header.size <= _MAX_EXTENDED_BYTES:
        raise BrokenTar(f"has an extended header of {header.size} bytes at byte {at}")
    content = source.take(padded(header.size))
    if len(content) < padded(header.size):
        raise BrokenTar(f"ends in the extended header at byte {at}")
    content = content[: header.size]
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.rstrip(b"\0").decode("utf-8", "replace")}
    return _records(content, at) if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE) else {}


def _records(content: bytes, at: int) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE` + newline of a pax header."""
    found: dict[str, str] = {}
    position = 0
    while position < len(content):
        length, space, _ = content[position : position + 20].partition(b" ")
        stop = position + (int(length) if length.isdigit() else 0)
        key, equals, value = content[position + len(length) + 1 : stop - 1].partition(b"=")
        if not (space and equals) or stop > len(content) or content[stop - 1 : stop] != b"\n":
            raise BrokenTar(f"has a pax header at byte {at} that cannot be read")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        position = stop
    return found


def _size(extended: str | None, header: tarfile.TarInfo, at: int) -> int:
    if extended is not None and not (extended.isascii() and extended.isdigit()):
        raise BrokenTar(f"has a pax header before byte {at} whose size is {extended[:40]!r}")
    size = header.size if extended is None else int(extended[:30])
    if size < 0:
        raise BrokenTar(f"has a file of {size} bytes at byte {at}")
    return size
