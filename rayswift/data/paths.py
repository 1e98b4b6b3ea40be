"""Files behind paths, globs, folders and URLs, chained ones too (`zip://a.jsonl::s3://bucket/x.zip`), through fsspec.

Knows where bytes lie; what they mean is known by `sources` and the readers.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import IO, Any, cast

from rayswift.data.hub_copies import is_pinned_file, local_copy
from rayswift.errors import DataError

_CACHES = ("simplecache", "filecache", "blockcache")
"""Links of a chained URL that have no file name of their own, but the next link's."""
_NO_DATA = ("README*", "readme.*", "LICENSE*", "license.*", "dataset_info*.json", "*.md")
"""What lies beside the data in a folder: it is read only where it is named, or matched by a glob."""


def find(path: str, endings: Sequence[str]) -> list[str]:
    """The sorted absolute paths or URLs of the files at `path`; raises whatever the fsspec backend raises.

    A name that exists is taken as it is, so that brackets in it are not read as a glob. A folder stands for the files
    below it with one of these `endings`, without hidden ones, read-me files, licences and Hugging Face's descriptions.
    """
    filesystem, name = _filesystem(path)
    if filesystem.isfile(name):
        found = [name]
    elif filesystem.isdir(name):
        found = [file for file in filesystem.find(name) if _is_data(file.removeprefix(name), endings)]
    elif any(mark in name for mark in "*?["):
        found = [file for file in filesystem.glob(name) if filesystem.isfile(file)]
    else:
        found = [name] if filesystem.exists(name) else []
    return sorted(_full_name(path, filesystem, one) for one in found)


def folder_named(path: str) -> str | None:
    """The absolute path or URL of the folder at `path`, with a slash at its end; None when there is no folder."""
    filesystem, name = _filesystem(path)
    if "::" in path or not filesystem.isdir(name):
        return None
    return _full_name(path, filesystem, name).rstrip("/") + "/"


def files_below(folder: str, endings: Sequence[str]) -> list[tuple[str, int]]:
    """The files below a folder with one of these `endings`, without hidden ones: sorted paths from there, and sizes."""
    filesystem, name = _filesystem(folder)
    found = filesystem.find(name, detail=True)
    below = ((str(file).removeprefix(name).strip("/"), int(about["size"])) for file, about in found.items())
    return sorted((file, size) for file, size in below if _is_data(file, endings))


def closest(path: str) -> str:
    """A hint for a path that leads nowhere: the most similar name beside it, or what there is."""
    filesystem, name = _filesystem(path)
    parent, slash, base = name.rpartition("/")
    try:
        beside = [str(one).rstrip("/").rpartition("/")[2] for one in filesystem.ls(parent or slash, detail=False)]
    except Exception:  # only a hint is lost, and the error that is about to be raised names the path
        return f"check the path; its folder {parent} does not exist"
    close = difflib.get_close_matches(base, beside, n=1, cutoff=0.5)
    return (
        f"did you mean {parent}{slash}{close[0]}?"
        if close
        else f"the folder has {', '.join(sorted(beside)[:5]) or 'no files'}"
    )


def file_name(path: str) -> str:
    """The part of a path or URL that ends with the file's own name."""
    return path.split("::")[_named_link(path)]


def folder_of(path: str) -> str:
    """The folder or URL that a file lies in."""
    return path.rpartition("/")[0] or "."


def size_of(path: str) -> int | None:
    """The size of a file in bytes, None where its file system does not tell. Raises FileNotFoundError."""
    filesystem, name = _filesystem(path)
    size = filesystem.info(name).get("size")
    return None if size is None else int(size)


def open_file(path: str) -> IO[bytes]:
    """The file, opened for reading bytes."""
    filesystem, name = _filesystem(path)
    return cast(IO[bytes], filesystem.open(name, "rb"))


def read_range(path: str, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of a file, in one request. Raises DataError when the file is gone or shorter."""
    filesystem, name = _filesystem(path)
    try:
        data = cast(bytes, filesystem.cat_file(name, start=start, end=stop))
    except FileNotFoundError as error:
        raise DataError(f"{path} was removed after it was indexed; put it back and resume the run") from error
    if len(data) > stop - start:  # a web server that ignores the Range header sends the whole file
        data = data[start:stop]
    if len(data) != stop - start:
        raise DataError(f"{path} changed after it was indexed; leave data files alone while a run reads them")
    return data


@lru_cache(maxsize=4096)  # rows may name millions of files
def _filesystem(path: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    filesystem, name = url_to_fs(local_copy(path) if is_pinned_file(path) else path)
    return filesystem, name


def _is_data(below: str, endings: Sequence[str]) -> bool:
    """`below` is the file's path in the folder that was named."""
    parts = below.strip("/").split("/")
    hidden = any(part.startswith(".") for part in parts)
    known = parts[-1].lower().endswith(tuple(endings))
    return known and not hidden and not any(fnmatchcase(parts[-1], pattern) for pattern in _NO_DATA)


def _full_name(path: str, filesystem: Any, name: str) -> str:
    """The absolute path or URL of a file that was found at `path`: workers run in other directories."""
    if "::" not in path:
        protocol = filesystem.protocol if isinstance(filesystem.protocol, str) else filesystem.protocol[0]
        return name if protocol in ("file", "local") else str(filesystem.unstrip_protocol(name))
    links, named = path.split("::"), _named_link(path)
    protocol, mark, _ = links[named].partition("://")
    is_path = not mark and named == len(links) - 1
    links[named] = name if is_path or "://" in name else f"{protocol}://{name}"
    links[-1] = links[-1] if "://" in links[-1] else os.path.abspath(links[-1])
    return "::".join(links)


def _named_link(path: str) -> int:
    """Which link of a chained URL has the file's name; 0 for a plain path."""
    protocols = [link.partition("://")[0] for link in path.split("::")]
    return next((place for place, one in enumerate(protocols) if one not in _CACHES), len(protocols) - 1)
