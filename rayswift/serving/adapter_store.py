"""The adapters beside one served model: names to local folders, out of a folder or a storage that fsspec reaches.

Knows copying from storage and when a copy is out of date. Which folders are adapters is decided by
`serving/adapters.py`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from rayswift.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BINDING
from rayswift.serving.adapters import check_adapter_name, find_adapter
from rayswift.serving.api_errors import unknown_model
from rayswift.serving.engine import Adapter, Refused

_MAX_LISTED = 1000
_MAX_BYTES = 4 * 2**30
LOOK_EVERY_S = 10.0
"""How often a storage is asked whether an adapter was written again: not with every request."""


class AdapterStore:
    """Adapters below a local folder or a URL. Safe to call from several threads."""

    def __init__(self, root: str) -> None:
        self._root, self._is_remote = root, "://" in root
        self._lock, self._copied, self._looked = threading.Lock(), dict[str, str](), dict[str, float]()
        self._home = own_folder(self, "rayswift-adapters-") if self._is_remote else None

    def find(self, name: str) -> Adapter:
        """The adapter of a name, copied here first if it lies in a storage. Raises ApiError (404) where there is none.

        Raises Refused for one that is too large to be fetched.
        """
        if self._home is None:
            return Adapter(name, str(find_adapter(Path(self._root), name)))
        check_adapter_name(name)
        with self._lock:
            if time.monotonic() - self._looked.get(name, -LOOK_EVERY_S) >= LOOK_EVERY_S:
                self._fetch(name, self._home)
                self._looked[name] = time.monotonic()
            return Adapter(name, str(find_adapter(self._home, name)))

    def names(self) -> list[str]:
        """The sorted names of the adapters directly below a local folder; storages are not listed."""
        found: list[str] = []
        if not self._is_remote:
            with suppress(OSError):
                folders = sorted(os.scandir(self._root), key=lambda entry: entry.name)[:_MAX_LISTED]
                found = [entry.name for entry in folders if (Path(entry.path) / ADAPTER_CONFIG).is_file()]
        return found

    def _fetch(self, name: str, home: Path) -> None:
        """Copies the adapter's files unless the copy is of what is there now."""
        from fsspec.core import url_to_fs

        try:
            fs, folder = url_to_fs(f"{self._root.rstrip('/')}/{name}")
            fs.invalidate_cache()
            files = {file: fs.info(f"{folder}/{file}") for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, BINDING)}
        except Exception as error:  # every backend raises its own types for what is not there
            raise unknown_model(name) from error
        if sum(int(info["size"]) for info in files.values()) > _MAX_BYTES:
            raise Refused(f"the adapter {name} is larger than {_MAX_BYTES} bytes")
        state = repr({file: _state(fs, f"{folder}/{file}", info) for file, info in files.items()})
        if self._copied.get(name) == state:
            return
        target = home / name
        target.mkdir(parents=True, exist_ok=True)
        for file in files:
            partial = target / f".{file}.part"
            fs.get_file(f"{folder}/{file}", str(partial))
            os.replace(partial, target / file)
        self._copied[name] = state


def own_folder(owner: object, prefix: str) -> Path:
    """A new temporary folder, removed when its owner is."""
    folder = tempfile.mkdtemp(prefix=prefix)
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _state(fs: Any, path: str, info: dict[str, Any]) -> Any:
    """What changes when a file is written again: its ETag or its time, and its size."""
    with suppress(NotImplementedError, KeyError):
        return fs.checksum(path)
    return (info["size"], info.get("mtime"), info.get("ETag"))
