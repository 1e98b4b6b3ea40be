"""The bytes of a medium: from the folder of its data file, a data URI, the row itself, or, where allowed, elsewhere."""

from __future__ import annotations

import os
import posixpath
import stat
from urllib.parse import unquote

from rayswift.config.job import MediaSpec
from rayswift.data.formats import RowError
from rayswift.data.media.columns import data_uri
from rayswift.data.paths import folder_of, open_file, size_of
from rayswift.data.types import Medium

_WEB = ("http://", "https://")
_LOCAL = "file://"


def read(medium: Medium, data_file: str, spec: MediaSpec) -> bytes:
    """The bytes of the medium of a row of `data_file`, at most `spec.max_bytes`.

    Raises RowError for what is missing, too large, or lies where the job does not allow to read.
    """
    if isinstance(medium.source, bytes):
        return _checked(medium.source, medium.kind, spec)
    if medium.source.startswith("data:"):
        return _checked(data_uri(medium.source), medium.kind, spec)
    if spec.folder is None and "::" in data_file:
        raise RowError(f"names {medium.source}, and {data_file} lies inside another file: set data.media.folder")
    place = _place(medium.source, spec.folder or folder_of(data_file), spec)
    try:
        size = _size(place)
        if size is not None and size > spec.max_bytes:
            raise _too_large(medium.kind, size, spec)
        with open_file(place) if "://" in place else open(place, "rb") as stream:
            return _checked(stream.read(spec.max_bytes + 1), medium.kind, spec)
    except FileNotFoundError as error:
        why = f"cannot be found: {error.__cause__ or error}" if place.startswith(_WEB) else "does not exist"
        raise RowError(f"has the {medium.kind} {medium.source}, which {why}") from error
    except OSError as error:
        raise RowError(f"has the {medium.kind} {medium.source}, which cannot be read: {error}") from error


def _size(place: str) -> int | None:
    """Bytes of the file. A local path is no business of fsspec, which takes `::` in a name for a chain of URLs."""
    if "://" in place:
        return size_of(place)
    found = os.stat(place)
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is no file")  # a pipe would be waited for without end
    return found.st_size


def _place(source: str, folder: str, spec: MediaSpec) -> str:
    """The path or URL to open. What is relative lies in `folder`, and must not leave it."""
    source, folder = source.removeprefix(_LOCAL), folder.removeprefix(_LOCAL).rstrip("/") or "/"
    if source.startswith(_WEB):
        if not spec.allow_urls and not _lies_in(source, folder):
            raise RowError("names a URL, which is not fetched: download it, or set data.media.allow_urls=true")
        return source
    remote = "://" in source or "://" in folder
    if remote:
        joined = source if "://" in source else f"{folder}/{source}"
        whole, inside = _normal(joined), _lies_in(joined, folder)
    else:
        whole, root = os.path.realpath(os.path.join(folder, source)), os.path.realpath(folder)
        inside = whole.startswith(f"{root.rstrip('/')}/")
    if not inside and not spec.allow_outside:
        raise RowError(
            f"names {source}, which is outside of {folder}: set data.media.folder to the folder the media lie in, or "
            "data.media.allow_outside=true"
        )
    return whole


def _normal(url: str) -> str:
    head, _, path = url.partition("://")
    return f"{head}://{posixpath.normpath(path)}"


def _lies_in(url: str, folder: str) -> bool:
    """Also with the dots that a server reads in `%2e%2e`."""
    return all(_normal(one).startswith(f"{_normal(folder)}/") for one in (url, unquote(url)))


def _checked(content: bytes, kind: str, spec: MediaSpec) -> bytes:
    if not content:
        raise RowError(f"has an empty {kind}")
    if len(content) > spec.max_bytes:
        raise _too_large(kind, len(content), spec)
    return content


def _too_large(kind: str, size: int, spec: MediaSpec) -> RowError:
    return RowError(f"has {'an' if kind != 'video' else 'a'} {kind} of {size} bytes or more, over "
                    f"data.media.max_bytes={spec.max_bytes}")  # fmt: skip
