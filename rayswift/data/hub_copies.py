"""A machine's own copies of files that hubs keep, named by URLs that say which commit: fetched once, and checked.

Knows such URLs, hubs and their caches. How a user spells a dataset, and which files of it are read, is known by
`hub_sources`.
"""

from __future__ import annotations

import os
import re
from functools import cache
from typing import cast
from urllib.parse import quote, unquote

from rayswift import plugins
from rayswift.data.hubs import Hub, HubError, HubFile, Pin, check
from rayswift.errors import DataError

_URL = re.compile(r"(?P<hub>hf|ms)://datasets/(?P<repo>[^@]+)@(?P<name>[^~/]*)~(?P<commit>[0-9a-f]{40})/(?P<path>.+)")


def url_of(hub: str, repo: str, pin: Pin, path: str) -> str:
    """The URL of a file of a commit on a hub."""
    return f"{hub}://datasets/{repo}@{quote(pin.name, safe='')}~{pin.commit}/{path}"


def is_pinned_file(path: str) -> bool:
    """Whether a path is the URL of a file of a commit on a hub."""
    return _URL.fullmatch(path) is not None


def local_copy(url: str) -> str:
    """The path of this machine's copy of a pinned file. Raises FileNotFoundError for one that the commit does not have,
    DataError where the hub cannot give it, or gives other bytes."""
    hub, repo, pin, path = _parts(url)
    try:
        files = tree_of(hub, repo, pin)
        if path not in files:
            raise FileNotFoundError(url)
        return hub_named(hub).download(repo, pin, files[path])
    except HubError as error:
        raise DataError(f"{url} {error.rule}; {error.fix}") from error


def check_copy(url: str, sha256: str) -> None:
    """Raises DataError when the bytes that were read of a pinned file are not those of the commit."""
    hub, repo, pin, path = _parts(url)
    local, file = local_copy(url), tree_of(hub, repo, pin)[path]
    if file.sha256 is None and file.git_sha1 is None:  # listed without network: huggingface_hub's cache names blobs so
        name = os.path.basename(os.path.realpath(local))
        file = HubFile(path, file.size, name if len(name) == 64 else None, name if len(name) == 40 else None)
    check(file, local, url, sha256)


@cache
def hub_named(name: str) -> Hub:
    """The hub of this name, one for a process."""
    return cast(Hub, plugins.load("data.hubs", name)())


@cache
def tree_of(hub: str, repo: str, pin: Pin) -> dict[str, HubFile]:
    """The files of a commit by their paths, asked for once per process."""
    return {file.path: file for file in hub_named(hub).files(repo, pin)}


def _parts(url: str) -> tuple[str, str, Pin, str]:
    found = _URL.fullmatch(url)
    assert found is not None, "the URL of a pinned file"
    return found["hub"], found["repo"], Pin(unquote(found["name"]), found["commit"]), found["path"]
