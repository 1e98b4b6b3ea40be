"""Writes checkpoints in the background: shards by torch.distributed.checkpoint, our manifest last.

Every rank stages its shards to host memory, then training goes on while a thread writes them, each rank hashes
the files it wrote, and rank 0 commits the manifest and removes the oldest checkpoints. One save at a time.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

from rayswift.errors import CheckpointError
from rayswift.training import checkpoint
from rayswift.training.checkpoint import CheckpointManifest, FileEntry
from rayswift.training.run_dir import RunDir

_FULL_BYTES = 1 << 20  # what a disk still reports as free when a checkpoint did not fit any more


class Saver:
    """Saves the state of all ranks of the process group; every method is called by all of them."""

    def __init__(self, run_dir: str, keep: int, *, saved_step: int | None = None) -> None:
        """`saved_step` is that of a valid checkpoint the run continues from."""
        self._run_dir, self._keep = RunDir(run_dir), keep
        self._saved_step = saved_step
        self._rank = dist.get_rank()
        self._group = dist.new_group(backend="gloo")
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-commit")
        self._pending: Future[None] | None = None

    def save(
        self, step: int, state: dict[str, Any], manifest: Callable[[dict[str, FileEntry]], CheckpointManifest]
    ) -> None:
        """Start saving; returns once the state is staged. `manifest` is called by rank 0's thread, files written.

        A step that was saved already only gets the new manifest: its files are whole and may be the only ones.
        Raises CheckpointError if the save before this one failed.
        """
        self.wait()
        folder = checkpoint.folder_name(step)
        if step == self._saved_step:
            self._pending = self._pool.submit(self._replace_manifest, f"{self._run_dir.url}/{folder}", manifest)
            return
        if self._rank == 0:
            self._run_dir.remove(folder)
            self._run_dir.fs.makedirs(self._run_dir.path(folder), exist_ok=True)
        dist.barrier(self._group)
        url = f"{self._run_dir.url}/{folder}"
        writing = async_save(
            state,
            storage_writer=checkpoint.storage_writer(url),
            process_group=self._group,
            async_checkpointer_type=AsyncCheckpointerType.THREAD,
        )
        self._pending = self._pool.submit(self._commit, writing, url, manifest)
        self._saved_step = step

    def poll(self) -> None:
        """Raise CheckpointError at once when the pending save has failed; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Return when the pending save is committed. Raises CheckpointError with the reason when it failed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except (Exception, CheckpointException) as error:  # torch's own is no Exception
            self._saved_step = None
            raise CheckpointError(_explain(error, self._run_dir), path=self._run_dir.url) from error

    def close(self) -> None:
        """Wait for the pending save and stop the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _commit(self, writing: Any, url: str, manifest: Callable[[dict[str, FileEntry]], CheckpointManifest]) -> None:
        writing.result()
        folder = RunDir(url)
        mine = {name: self._entry(folder, name) for name in self._my_files(folder)}
        gathered: list[dict[str, FileEntry]] | None = [{}] * dist.get_world_size() if self._rank == 0 else None
        dist.gather_object(mine, gathered, dst=0, group=self._group)
        if gathered is None:
            return
        files = {name: entry for part in gathered for name, entry in part.items()}
        folder.write_text(checkpoint.MANIFEST, manifest(files).model_dump_json(indent=1) + "\n")
        self._run_dir.sync(checkpoint.FOLDER)  # only what is on disk under its name may replace an older checkpoint
        checkpoint.prune(self._run_dir, self._keep)

    def _replace_manifest(self, url: str, manifest: Callable[[dict[str, FileEntry]], CheckpointManifest]) -> None:
        if self._rank == 0:
            files = checkpoint.read_manifest(url).files
            RunDir(url).write_text(checkpoint.MANIFEST, manifest(files).model_dump_json(indent=1) + "\n")

    def _my_files(self, folder: RunDir) -> list[str]:
        """torch names a rank's files `__RANK_*.distcp`; rank 0 also wrote the metadata."""
        folder.fs.invalidate_cache()
        names = [str(path).rsplit("/", 1)[-1] for path in folder.fs.ls(folder.root, detail=False)]
        return [n for n in names if n.startswith(f"__{self._rank}_") or (self._rank == 0 and n == ".metadata")]

    @staticmethod
    def _entry(folder: RunDir, name: str) -> FileEntry:
        return FileEntry(size=folder.fs.size(folder.path(name)), sha256=checkpoint.sha256(folder, name))


def _explain(error: BaseException, run_dir: RunDir) -> str:
    """One line for a failed save, whatever wrapped the cause on its way here.

    torch's file writer turns "no space left" into "unexpected pos" and loses the cause between ranks, so the disk
    is asked as well.
    """
    chain = list(_causes(error))
    told = any(os.strerror(errno.ENOSPC) in str(cause) for cause in chain)
    if told or (run_dir.is_local and shutil.disk_usage(run_dir.root).free < _FULL_BYTES):
        reason = "no space left on device; free some, or lower train.keep_checkpoints"
    else:
        text = str(chain[-1]).strip().splitlines()
        reason = f"{type(chain[-1]).__name__}: {text[0] if text else ''}"
    return f"holds a checkpoint that could not be written: {reason}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what is behind it, innermost last."""
    while error is not None:
        yield error
        if isinstance(error, CheckpointException) and error.failures:
            error = next(iter(error.failures.values()))[0]
        else:
            error = error.__cause__ or error.__context__
