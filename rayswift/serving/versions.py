"""Which version of a model a folder holds. Of what is in the manifest of an export it knows `version` alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

VERSION_CHARS = 12
VERSION_HEADER = "X-RaySwift-Version"
"""Of a reply: which version has answered. Of a request: which one is to answer."""
_MANIFEST = "rayswift.json"


def version_of(folder: str | os.PathLike[str], manifest: str = _MANIFEST) -> str | None:
    """The first 12 hex digits of the sha256 of the folder's rayswift.json; None for a folder that is no export.

    The manifest has the sha256 of every other file, so exports of one version are the same in every byte that is
    loaded. An evaluation that is put into the manifest later writes there the version that it had before: what was
    promoted under a version stays that version.
    """
    try:
        content = (Path(folder) / manifest).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _recorded(content) or hashlib.sha256(content).hexdigest()[:VERSION_CHARS]


def _recorded(content: bytes) -> str | None:
    try:
        found = json.loads(content)["version"]
    except (ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, str) and re.fullmatch(f"[0-9a-f]{{{VERSION_CHARS}}}", found) else None
