"""The adapters beside one served model: names to local folders, out of a folder or a storage that fsspec reaches.

Knows copying from storage and when a copy is out of date. Which folders are adapters is decided by
`serving/adapters.py`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import tempfile
import threading
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from rayswift.errors import ConfigError
from rayswift.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BINDING
from rayswift.serving.adapters import check_adapter_name, find_adapter
from rayswift.serving.api_errors import ApiError, unknown_model
from rayswift.serving.engine import Adapter, Refused

_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, BINDING)
_MAX_LISTED, _MAX_TRIES = 1000, 3
_MAX_BYTES = 4 * 2**30
LISTING = "rayswift-list-adapters"
"""The name of threads that look at a storage."""
LOOK_EVERY_S = 10.0
"""How often a storage is asked whether an adapter was written again, and what it holds: not with every request."""
_PATIENCE_S = 60.0
"""How much later one that does not answer is asked again about what was copied: requests wait for its silence."""
_REFRESH_S = 2.0
"""How long a request waits to know whether what was copied was written again; then it gets the copy."""
_ABSENT_S = 5.0
"""How long it is known that there is no adapter of a name."""
_MAX_AT_ONCE, _MAX_LOOKS, _MAX_WAITING, _MAX_ABSENT = 4, 64, 64, 1024
"""Names that are looked for at the same time; those, and others that wait for it; requests that wait for what is not
copied, each of which Serve counts among those that the replica answers; names known to be absent."""
_log = logging.getLogger("rayswift.serving")


class AdapterStore:
    """Adapters below a local folder or a URL, looked for in threads of its own: a storage may take its time.

    Credentials of a storage are those that its fsspec package finds, such as AWS_ACCESS_KEY_ID in the environment of
    this process. Raises ConfigError where that package is not installed.
    """

    def __init__(self, root: str) -> None:
        self._root, self._is_remote = root.rstrip("/"), "://" in root
        self._lock, self._pool = threading.Lock(), ThreadPoolExecutor(_MAX_AT_ONCE, "rayswift-adapters")
        self._num_waiting = 0
        self._looks, self._absent = dict[str, Future[str]](), dict[str, float]()
        self._copied, self._folders, self._looked = dict[str, str](), dict[str, str](), dict[str, float]()
        self._listing, self._listed, self._listed_at = threading.Lock(), tuple[str, ...](), -LOOK_EVERY_S
        self._home = own_folder(self, "rayswift-adapters-") if self._is_remote else None
        if self._is_remote:
            _check_package(root)

    async def find(self, name: str) -> Adapter:
        """The adapter of a name, copied here first if it lies in a storage. Raises ApiError (404) where there is none.

        Raises Refused for one that is too large to be fetched, and ApiError (503) while a storage does not answer,
        unless it has been copied before. Waits for no other name's, and for what was copied only a moment.
        """
        check_adapter_name(name)
        folder = self._folders.get(name)
        look = self._look(name, is_copied=folder is not None)
        if folder is None:
            assert look is not None, "what is not copied is looked for"
            folder = await self._found(look)
        elif look is not None and await _ended(look, _REFRESH_S):
            folder = look.result()
        return Adapter(name, folder)

    async def _found(self, look: Future[str]) -> str:
        """What a search finds in the end. Raises ApiError (503) where too many wait for a storage already."""
        if self._is_remote and self._num_waiting >= _MAX_WAITING:
            raise _silent()
        self._num_waiting += 1
        try:
            await _ended(look, None)
            return look.result()
        finally:
            self._num_waiting -= 1

    def _look(self, name: str, *, is_copied: bool) -> Future[str] | None:
        """The search for a name, one for all who ask; None for what is copied and need not, or cannot, be looked at.

        Raises ApiError for what is not there, or where too many others are looked for.
        """
        with self._lock:
            if (running := self._looks.get(name)) is not None:
                return None if is_copied else running
            if time.monotonic() < self._absent.get(name, 0.0):
                raise unknown_model(name)
            is_fresh = is_copied and time.monotonic() - self._looked[name] < LOOK_EVERY_S
            if is_fresh or (is_copied and len(self._looks) >= _MAX_LOOKS):
                return None
            if len(self._looks) >= _MAX_LOOKS:
                raise _silent()
            look = self._looks[name] = self._pool.submit(self._find, name)
        look.add_done_callback(lambda _: self._looks.pop(name))
        return look

    def _find(self, name: str) -> str:
        """The folder, by the time this ends. Raises as `find` does."""
        if self._home is None:
            return str(find_adapter(Path(self._root), name))
        try:
            is_away = not self._fetch(name, self._home)
            folder = str(find_adapter(self._home, name))
        except ApiError as error:
            if error.status == 404:
                self._forget(name)
            raise
        self._looked[name] = time.monotonic() + (_PATIENCE_S if is_away else 0.0)
        self._folders[name] = folder
        return folder

    def _forget(self, name: str) -> None:
        with self._lock:
            self._copied.pop(name, None)
            self._folders.pop(name, None)
            if len(self._absent) >= _MAX_ABSENT:
                self._absent.clear()
            self._absent[name] = time.monotonic() + _ABSENT_S

    def names(self) -> list[str]:
        """The sorted names of the adapters directly below the folder; of a storage, when it was last looked at.

        Never waits for a storage: it is looked at in the background.
        """
        if self._is_remote:
            is_due = time.monotonic() - self._listed_at >= LOOK_EVERY_S
            if is_due and self._listing.acquire(blocking=False):
                threading.Thread(target=self._list, name=LISTING, daemon=True).start()
            return list(self._listed)
        found: list[str] = []
        with suppress(OSError):
            folders = sorted(os.scandir(self._root), key=lambda entry: entry.name)[:_MAX_LISTED]
            found = [entry.name for entry in folders if (Path(entry.path) / ADAPTER_CONFIG).is_file()]
        return found

    def _list(self) -> None:
        """Looks at a storage. A folder that was an adapter is not asked again whether it is one."""
        from fsspec.core import url_to_fs

        try:
            fs, folder = url_to_fs(self._root)
            fs.invalidate_cache()
            entries = sorted(
                str(entry["name"]).rstrip("/") for entry in fs.ls(folder, detail=True) if entry["type"] == "directory"
            )
            known = set(self._listed)
            self._listed = tuple(
                name for path in entries[:_MAX_LISTED]
                if (name := path.rpartition("/")[2]) in known or fs.exists(f"{path}/{ADAPTER_CONFIG}")
            )  # fmt: skip
        except Exception as error:  # every backend raises its own types
            _log.warning("%s cannot be listed: %s %s", self._root, type(error).__name__, error)
        finally:
            self._listed_at = time.monotonic()
            self._listing.release()

    def _fetch(self, name: str, home: Path) -> bool:
        """Copies the adapter's files unless the copy is of what is there now; False if that is not known."""
        try:
            self._copy(name, home / name)
            return True
        except FileNotFoundError as error:
            raise unknown_model(name) from error
        except Refused:
            raise
        except Exception as error:  # every backend raises its own types for what fails
            _log.warning("%s/%s cannot be fetched: %s %s", self._root, name, type(error).__name__, error)
            if name not in self._copied:
                raise _silent() from error
            return False

    def _copy(self, name: str, target: Path) -> None:
        """Until the files are of one state: they may be written again while they are copied."""
        from fsspec.core import url_to_fs

        fs, folder = url_to_fs(f"{self._root}/{name}")
        for _ in range(_MAX_TRIES):
            state = _state(fs, folder, name)
            if self._copied.get(name) == state:
                return
            target.mkdir(parents=True, exist_ok=True)
            for file in _FILES:
                fs.get_file(f"{folder}/{file}", str(target / f".{file}.part"))
            if _state(fs, folder, name) == state:
                for file in _FILES:
                    os.replace(target / f".{file}.part", target / file)
                self._copied[name] = state
                return
        raise OSError(f"was written again {_MAX_TRIES} times while it was fetched")


def packed_in_training(root: str) -> dict[str, str]:
    """The adapters directly below a local folder whose base was in 4 bits in their training, and as what: `nf4`."""
    found = {}
    for name in AdapterStore(root).names():
        with suppress(OSError, ValueError):  # whoever loads it says what is wrong with it
            binding = json.loads((Path(root) / name / BINDING).read_text(encoding="utf-8"))
            if isinstance(binding, dict) and (how := binding.get("quantization")):
                found[name] = str(how)
    return found


def told_of_packed(names: str, how: str) -> str:
    """What is told of adapters of such a base. They are bound to the stored one, of whose weights those were made."""
    return (
        f"{names} trained on a base in {how} and served on its stored weights, which are others: answers are not those"
        " of the trained model; to have those, export the run merged (rayswift export RUN FOLDER) and serve FOLDER"
    )


async def _ended(look: Future[str], limit_s: float | None) -> bool:
    """Whether a search has ended within a time. It goes on for others, however this one's waiting ends."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def tell(_: Future[str]) -> None:
        with suppress(RuntimeError):  # the loop has ended before
            loop.call_soon_threadsafe(ended.set)

    look.add_done_callback(tell)
    with suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            await ended.wait()
    return look.done()


def _silent() -> ApiError:
    message = "the storage of the adapters does not answer; try again shortly"
    return ApiError(message, status=503, headers={"Retry-After": "10"})


def _check_package(root: str) -> None:
    """Raises ConfigError where fsspec does not know the storage, or its package is not installed."""
    import fsspec

    protocol = root.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"cannot be read from here: {error}", path="adapters", value=root,
            fix="install rayswift[s3], rayswift[gcs] or the package named in the environment that serves",
        ) from error  # fmt: skip


def own_folder(owner: object, prefix: str) -> Path:
    """A new temporary folder, removed when its owner is."""
    folder = tempfile.mkdtemp(prefix=prefix)
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _state(fs: Any, folder: str, name: str) -> str:
    """What changes when an adapter is written again: sizes, and ETags or times. Raises Refused for one too large."""
    fs.invalidate_cache()
    files = {file: fs.info(f"{folder}/{file}") for file in _FILES}
    if sum(int(info["size"]) for info in files.values()) > _MAX_BYTES:
        raise Refused(f"the adapter {name} is larger than {_MAX_BYTES} bytes")
    return repr({file: _version(fs, f"{folder}/{file}", info) for file, info in files.items()})


def _version(fs: Any, path: str, info: dict[str, Any]) -> Any:
    with suppress(NotImplementedError, KeyError):
        return fs.checksum(path)
    return (info["size"], info.get("mtime"), info.get("ETag"))
