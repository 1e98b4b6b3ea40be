"""The run directory: one folder or fsspec URL per run, and the names of what lies in it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import fsspec

from rayswift.errors import CheckpointError, ConfigError

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
QUARANTINE = "quarantine.jsonl"
HELD_OUT_QUARANTINE = "quarantine-eval.jsonl"
STREAM = "stream.json"
ROWS = "rows"
RECORDS = (
    METRICS, EVENTS, QUARANTINE, HELD_OUT_QUARANTINE, STREAM, ROWS, "tensorboard", "report.json", "report.md",
    "curves.png",
)  # fmt: skip
"""What a run leaves beside its job, plan and checkpoints."""
_LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


class RunDir:
    """Files of one run by name, on a local disk or any fsspec file system."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError when no file system knows the URL's protocol."""
        try:
            self.fs, self.root = fsspec.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"cannot be opened: {error}", path="output", value=url, fix="install the file system's package"
            ) from error
        self.url = url.rstrip("/")
        self.is_local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    def path(self, name: str) -> str:
        """The path of a file below the run directory, as its file system names it."""
        return f"{self.root.rstrip('/')}/{name}"

    def exists(self, name: str) -> bool:
        """Whether the file or folder is there."""
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self.path(name)))

    def read_text(self, name: str) -> str:
        """The content of a text file. Raises FileNotFoundError."""
        return self.read_bytes(name).decode("utf-8")

    def read_bytes(self, name: str) -> bytes:
        """The content of a file. Raises FileNotFoundError."""
        with self.fs.open(self.path(name), "rb") as stream:
            return bytes(stream.read())

    def names(self, name: str) -> list[str]:
        """The sorted names of what lies in a folder; none when it is absent."""
        if not self.exists(name):
            return []
        return sorted(str(one).rstrip("/").rsplit("/", 1)[-1] for one in self.fs.ls(self.path(name), detail=False))

    def write_text(self, name: str, text: str) -> None:
        """Replace a text file; see `write_bytes`."""
        self.write_bytes(name, text.encode("utf-8"))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Replace a file as a whole: written beside it, flushed to disk and renamed, so that no reader sees half."""
        self.fs.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        if not self.is_local:
            with self.fs.open(self.path(name), "wb") as stream:
                stream.write(content)
            return
        temporary = f"{self.path(name)}.{os.getpid()}.tmp"
        with writing(self):
            try:
                with open(temporary, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.path(name))
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary)
                raise
            self.sync(os.path.dirname(name))

    def sync(self, folder: str = "") -> None:
        """Make the names in a local folder durable: a rename is only on disk when its folder is."""
        if self.is_local:
            descriptor = os.open(self.path(folder), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def read_jsonl(self, name: str) -> list[dict[str, Any]]:
        """The objects of a JSON-lines file; none when it is absent. A last line cut off by a crash is left out."""
        if not self.exists(name):
            return []
        lines = self.read_text(name).split("\n")
        return [json.loads(line) for line in lines[:-1] if line]

    def write_jsonl(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        """Replace a JSON-lines file."""
        self.write_text(name, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))

    def remove(self, name: str) -> None:
        """Remove a file or a folder with everything in it; nothing happens when it is absent."""
        if self.exists(name):
            self.fs.rm(self.path(name), recursive=True)


@contextmanager
def writing(run_dir: RunDir) -> Iterator[None]:
    """Turns an error that writing again cannot mend, such as a full disk, into a CheckpointError; others pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _LASTING:
            raise
        raise CheckpointError(
            f"cannot be written: {os.strerror(error.errno)}",
            path="run",
            value=run_dir.url,
            fix="free some space or mend the disk, then run the same command again to continue",
        ) from error


class JsonlLog:
    """An append-only JSON-lines file of the run directory, continued from the lines a resumed run keeps.

    Local files are appended to line by line. Object stores cannot append: there the whole file is put again
    when `flush` is called.
    """

    def __init__(self, run_dir: RunDir, name: str, *, up_to_step: int) -> None:
        """Keeps the lines of steps up to `up_to_step`; later ones belong to work that was lost and is repeated."""
        self._run_dir, self._name = run_dir, name
        self._records = [r for r in run_dir.read_jsonl(name) if r.get("step", 0) <= up_to_step]
        run_dir.write_jsonl(name, self._records)
        self._file = open(run_dir.path(name), "a", encoding="utf-8") if run_dir.is_local else None  # noqa: SIM115

    def append(self, record: dict[str, Any]) -> None:
        """Add one line; on a local disk it is visible to readers at once."""
        if self._file is not None:
            with writing(self._run_dir):
                self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
                self._file.flush()
        else:
            self._records.append(record)

    def flush(self) -> None:
        """Make everything appended so far durable."""
        if self._file is not None:
            with writing(self._run_dir):
                os.fsync(self._file.fileno())
        else:
            self._run_dir.write_jsonl(self._name, self._records)

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        if self._file is not None:
            self._file.close()
