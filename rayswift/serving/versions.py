"""Which version of a model a folder holds. Knows the manifest of an export as bytes; knows nothing of what is in it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

VERSION_CHARS = 12
VERSION_HEADER = "X-RaySwift-Version"
"""Of a reply: which version has answered. Of a request: which one is to answer."""
_MANIFEST = "rayswift.json"


def version_of(folder: str | os.PathLike[str]) -> str | None:
    """The first 12 hex digits of the sha256 of the folder's rayswift.json; None for a folder that is no export.

    The manifest has the sha256 of every other file, so exports of one version are the same in every byte.
    """
    try:
        manifest = (Path(folder) / _MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return hashlib.sha256(manifest).hexdigest()[:VERSION_CHARS]
