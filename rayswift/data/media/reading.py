"""The bytes of a medium: from the folder of its data file, a data URI, the row itself, or, where allowed, elsewhere."""

from __future__ import annotations

import os
import posixpath

from rayswift.config.job import MediaSpec
from rayswift.data.formats import RowError
from rayswift.data.media.columns import data_uri
from rayswift.data.paths import folder_of, open_file, size_of
from rayswift.data.types import Medium

_WEB = ("http://", "https://")


def read(medium: Medium, data_file: str, spec: MediaSpec) -> bytes:
    """The bytes of the medium of a row of `data_file`, at most `spec.max_bytes`.

    Raises RowError for what is missing, too large, or lies where the job does not allow to read.
    """
    if isinstance(medium.source, bytes):
        return _checked(medium.source, medium.kind, spec)
    if medium.source.startswith("data:"):
        return _checked(data_uri(medium.source), medium.kind, spec)
    place = _place(medium.source, spec.folder or folder_of(data_file), spec)
    try:
        size = size_of(place)
        if size is not None and size > spec.max_bytes:
            raise _too_large(medium.kind, size, spec)
        with open_file(place) as stream:
            return _checked(stream.read(spec.max_bytes + 1), medium.kind, spec)
    except FileNotFoundError as error:
        raise RowError(f"has the {medium.kind} {medium.source}, which does not exist") from error
    except OSError as error:
        raise RowError(f"has the {medium.kind} {medium.source}, which cannot be read: {error}") from error


def _place(source: str, folder: str, spec: MediaSpec) -> str:
    """The path or URL to open. What is relative lies in `folder`, and must not leave it."""
    if source.startswith(_WEB):
        if not spec.allow_urls and not source.startswith(f"{folder}/"):
            raise RowError("names a URL, which is not fetched: download it, or set data.media.allow_urls=true")
        return source
    remote = "://" in source or "://" in folder
    if remote:
        joined = source if "://" in source else f"{folder}/{source}"
        head, _, path = joined.partition("://")
        whole = f"{head}://{posixpath.normpath(path)}"
        inside = whole.startswith(f"{folder.rstrip('/')}/")
    else:
        whole, root = os.path.realpath(os.path.join(folder, source)), os.path.realpath(folder)
        inside = whole.startswith(f"{root.rstrip('/')}/")
    if not inside and not spec.allow_outside:
        raise RowError(
            f"names {source}, which is outside of {folder}: set data.media.folder to the folder the media lie in, or "
            "data.media.allow_outside=true"
        )
    return whole


def _checked(content: bytes, kind: str, spec: MediaSpec) -> bytes:
    if not content:
        raise RowError(f"has an empty {kind}")
    if len(content) > spec.max_bytes:
        raise _too_large(kind, len(content), spec)
    return content


def _too_large(kind: str, size: int, spec: MediaSpec) -> RowError:
    return RowError(f"has {'an' if kind != 'video' else 'a'} {kind} of {size} bytes or more, over "
                    f"data.media.max_bytes={spec.max_bytes}")  # fmt: skip
