"""A folder appears whole or not at all: it is written under another name beside its place, then renamed.

Knows directories, fsync and rename; knows nothing of what the folder holds.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def staged_folder(target: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """A fresh folder beside `target`, on disk and renamed to it when the block ends, removed when the block raises.

    Raises FileExistsError when `target` exists and is not an empty folder, unless `replace`. Whoever reads `target`
    sees the old folder or the new one, never a mixture.
    """
    place = Path(os.path.abspath(target))
    if place.exists() and not replace and not is_empty_folder(place):
        raise FileExistsError(f"{place} exists")
    place.parent.mkdir(parents=True, exist_ok=True)
    stage = place.with_name(f".{place.name}.{os.getpid()}.staged")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        yield stage
        _sync_tree(stage)
        _swap(stage, place)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def is_empty_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder with nothing in it."""
    return os.path.isdir(path) and not os.listdir(path)


def _swap(stage: Path, place: Path) -> None:
    """Put `stage` at `place`; an old folder there is moved aside first and put back if the rename fails."""
    old = place.with_name(f".{place.name}.{os.getpid()}.replaced")
    if place.exists():
        os.rename(place, old)
    try:
        os.rename(stage, place)
    except OSError:
        with suppress(FileNotFoundError):
            os.rename(old, place)
        raise
    sync_folder(place.parent)
    shutil.rmtree(old, ignore_errors=True)


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
