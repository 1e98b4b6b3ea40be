"""Hubs that keep datasets as git repositories, one module each: what a revision is, which files it has, their bytes.

A hub knows its own protocol. What `hf::org/name:subset/split` means is known by `rayswift.data.hub_sources`, which
files a split has by `rayswift.data.splits`. What a hub once said of a commit never changes, so it is written down
beside the files: a run that has all of it needs no network.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Protocol
from urllib.parse import quote

from rayswift.errors import DataError

COMMIT = re.compile(r"[0-9a-f]{40}")


class HubError(Exception):
    """What a hub says no to, as the end of a sentence that begins with the source, and what to do about it."""

    def __init__(self, rule: str, fix: str) -> None:
        super().__init__(rule)
        self.rule, self.fix = rule, fix


@dataclass(frozen=True)
class Pin:
    """A revision that was looked up: its name, empty for the default branch, and the commit that it stood at."""

    name: str
    commit: str


@dataclass(frozen=True)
class HubFile:
    """A file of a commit. A hub tells the sha256 of large files, and of others the sha1 that git knows them by."""

    path: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None


class Hub(Protocol):
    """One hub. Everything raises HubError for what the hub has not, or does not give."""

    default_revision: ClassVar[str]

    def commit(self, repo: str, revision: str) -> str:
        """The commit that a branch or tag of a dataset stands at; the one of the last time if there is no network."""
        ...

    def files(self, repo: str, pin: Pin) -> list[HubFile]:
        """All files of a commit."""
        ...

    def download(self, repo: str, pin: Pin, file: HubFile) -> str:
        """The path of the file on this machine, fetched and checked if it is not here yet."""
        ...


def records(hub: str, repo: str) -> Path:
    """The folder that is kept of a dataset of a hub: `refs/`, `trees/` and, where a hub has no cache, `snapshots/`."""
    cache = os.environ.get("RAYSWIFT_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "rayswift"
    )
    return Path(cache) / hub / f"datasets--{repo.replace('/', '--')}"


def listed(folder: Path, commit: str, ask: Callable[[], list[HubFile]]) -> list[HubFile]:
    """The files of a commit as they were written down below `folder`, asked for and written down once.

    What comes without hashes, from another program's cache, is not written down: the hub may be asked next time.
    """
    path = folder / "trees" / f"{commit}.json"
    try:
        return [HubFile(**file) for file in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):  # never asked, or not readable: ask
        found = ask()
    if any(file.sha256 or file.git_sha1 for file in found):
        keep(path, json.dumps([asdict(file) for file in found]).encode())
    return found


def ref(folder: Path, revision: str) -> Path:
    """The file that says which commit a revision stood at."""
    return folder / "refs" / quote(revision, safe="")


def keep(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as stream:
        stream.write(content)
    os.replace(stream.name, path)


def check(file: HubFile, local: str, url: str, sha256: str | None = None) -> None:
    """Raises DataError when a local file is not the one of the commit. Its `sha256` is not computed if it is given."""
    size = os.path.getsize(local)
    if size != file.size:
        raise _mismatch(url, local, f"{size} bytes", f"{file.size}")
    if file.sha256 is not None:
        found = sha256 or _digest(local, hashlib.sha256())
        if found != file.sha256:
            raise _mismatch(url, local, f"the sha256 {found}", file.sha256)
    elif file.git_sha1 is not None:
        found = _digest(local, hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False))
        if found != file.git_sha1:
            raise _mismatch(url, local, f"git's hash {found}", file.git_sha1)


def _digest(local: str, digest: hashlib._Hash) -> str:
    with open(local, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _mismatch(url: str, local: str, found: str, expected: str) -> DataError:
    return DataError(f"{url} has {found}, and the hub says {expected}; remove {local} and fetch it again")
