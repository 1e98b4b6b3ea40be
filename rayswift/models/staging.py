"""A folder appears whole or not at all: it is written under another name beside its place, then renamed.

What a killed process leaves beside the place goes with the next one there of the same machine. Knows directories,
fsync, rename and locks; knows nothing of what the folder holds.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from rayswift.errors import RaySwiftError
from rayswift.locks import taken

_STAGED, _REPLACED = ".staged", ".replaced"
_TRIES = 10
_OCCUPIED = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}
"""What a rename to a folder that is not empty, or to no folder, fails with."""


@contextmanager
def staged_folder(
    target: str | os.PathLike[str], *, replace: bool = False, check: Callable[[str], object] | None = None
) -> Iterator[Path]:
    """A fresh folder beside `target`, on disk and renamed to it when the block ends, removed when the block raises.

    Raises FileExistsError when `target` exists and is not an empty folder, unless `replace`. Whoever reads `target`
    sees the old folder or the new one, never a mixture. The same holds when the block ends, which may be hours later:
    of a `target` that has come meanwhile, or of which `check` raises a RaySwiftError although it may be replaced,
    nothing is touched, and the finished folder stays beside it, as the RaySwiftError raised then says.
    """
    place = Path(os.path.abspath(target))
    if place.exists() and not replace and not is_empty_folder(place):
        raise FileExistsError(f"{place} exists")
    place.parent.mkdir(parents=True, exist_ok=True)
    _sweep(place)
    with _fresh(place) as stage:
        try:
            yield stage
            _sync_tree(stage)
            if replace and place.exists():
                _swap(stage, place, check)
            else:
                _put(stage, place)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise


@contextmanager
def _fresh(place: Path) -> Iterator[Path]:
    """A new folder beside a place, locked for the duration. Raises OSError when others sweep away each that is made."""
    for _ in range(_TRIES):
        stage = _beside(place, _STAGED)
        stage.mkdir()
        with _held(stage) as is_ours:
            if is_ours is not False and stage.exists():  # another may have taken it for left before the lock was
                yield stage
                return
    raise OSError(f"none of {_TRIES} new folders beside {place} was left there by others who write it")


def is_empty_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder with nothing in it."""
    return os.path.isdir(path) and not os.listdir(path)


def _put(stage: Path, place: Path) -> None:
    """Rename `stage` to `place`, which the system itself refuses where anything but an empty folder is there."""
    if place.is_symlink() and is_empty_folder(place):
        place.unlink()
    try:
        os.rename(stage, place)
    except OSError as error:
        if error.errno not in _OCCUPIED:
            raise
        raise _left_beside(stage, place, "has come there while this was made, and is not replaced") from error
    sync_folder(place.parent)


def _swap(stage: Path, place: Path, check: Callable[[str], object] | None) -> None:
    """Put `stage` at `place`; an old folder there is moved aside first and put back if the rename fails."""
    try:
        if check is not None and not is_empty_folder(place):
            check(str(place))
    except RaySwiftError as error:
        raise _left_beside(stage, place, f"is not replaced: {error}") from error
    old = _beside(place, _REPLACED)
    with _held(place):  # the folder's own lock, under whatever name
        with suppress(FileNotFoundError):  # another one replaces it, and has moved it
            os.rename(place, old)
        try:
            _put(stage, place)
        except BaseException:
            if old.exists() and not os.path.lexists(place):
                os.rename(old, place)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _left_beside(stage: Path, place: Path, reason: str) -> RaySwiftError:
    """The error to raise, with the finished folder under a name that is not swept."""
    kept = place.with_name(f"{place.name}.finished-{secrets.token_hex(4)}")
    os.rename(stage, kept)
    sync_folder(place.parent)
    return RaySwiftError(reason, path="folder", value=str(place), fix=f"what was made is whole and stays in {kept}")


def _beside(place: Path, suffix: str) -> Path:
    """A name of this call's own: processes of several machines or containers may have the same id."""
    return place.with_name(f".{place.name}.{os.getpid()}-{_machine()}-{secrets.token_hex(4)}{suffix}")


@cache
def _machine() -> str:
    """8 hex digits of the running kernel: the lock of a folder holds within it, and not over NFS."""
    try:
        told = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:  # no Linux
        told = str(uuid.getnode())
    return hashlib.sha256(told.encode()).hexdigest()[:8]


def _sweep(place: Path) -> None:
    """Remove what killed processes of this machine have left of a place.

    The folder there that one had moved aside comes back. Of other machines nobody here knows who lives.
    """
    left = re.compile(rf"\.{re.escape(place.name)}\.\d+-{_machine()}-[0-9a-f]{{8}}({_STAGED}|{_REPLACED})")
    for folder in [entry for entry in place.parent.iterdir() if left.fullmatch(entry.name)]:
        with _held(folder) as is_ours:
            if is_ours and folder.suffix == _REPLACED and not place.exists():
                os.rename(folder, place)
            elif is_ours:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[bool | None]:
    """The folder's lock for the duration, by which a living process is known. Yields whether nobody else holds it.

    None where the file system has no such locks: it is nobody's to sweep. False too where the folder is gone.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # swept by another
        yield False
        return
    is_ours: bool | None
    try:
        try:
            is_ours = taken(descriptor, 0)
        except OSError:
            is_ours = None
        yield is_ours
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        sync_folder(path)


def sync_folder(path: Path) -> None:
    """Flush one file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
