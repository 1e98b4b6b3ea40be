"""Checkpoints that can be trusted: which directories are valid, what is in them, and reading them back.

A checkpoint is `checkpoints/step-00000050/` with the files of torch.distributed.checkpoint and `manifest.json`,
which is written last. A directory without a valid manifest was interrupted: it is never read, and removed
before the next run starts. Writing is in `saver.py`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from rayswift.config.job import Job
from rayswift.data.ledger import Ledger
from rayswift.errors import CheckpointError
from rayswift.models.folder import rendered_otherwise
from rayswift.models.loading import local_folder
from rayswift.training.run_dir import RunDir

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
CHUNK = "chunk.json"
FOLDER = "checkpoints"
_BLOCK_BYTES = 1 << 20


class FileEntry(BaseModel):
    """Size in bytes and sha256 (hex) of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    sha256: str


class RowsEntry(FileEntry):
    """The newest file of the record of rows; it names the one before it in the same way (see `row_record`)."""

    name: str


class CheckpointManifest(BaseModel):
    """What a checkpoint holds. Invariant: every file of `files` was complete before this was written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    finished: bool
    job_hash: str
    job: dict[str, Any]
    layout: dict[str, int]
    engine: str
    ledger: dict[str, Any]
    seed: int
    base_sha256: str | None = None
    rendered_with: dict[str, str] | None = None
    """`rendering_sha256` of the base's folder when the run began; None for one that began before that was recorded."""
    rows: RowsEntry | None = None
    versions: dict[str, str]
    files: dict[str, FileEntry]


def folder_name(step: int) -> str:
    """`checkpoints/step-00000050`, below the run directory."""
    return f"{FOLDER}/step-{step:08d}"


def newest(run_dir: str, *, verify: bool = True) -> str:
    """The path of the newest valid checkpoint. Raises CheckpointError when there is none."""
    found = find_newest(RunDir(run_dir), verify=verify)
    if found is None:
        raise CheckpointError("holds no valid checkpoint", path=run_dir, fix="train first: rayswift train JOB.yaml")
    return f"{run_dir.rstrip('/')}/{folder_name(found.step)}"


def find_newest(run_dir: RunDir, *, verify: bool = True) -> CheckpointManifest | None:
    """The manifest of the newest valid checkpoint, or None. `verify` re-reads the files' contents, not sizes alone."""
    for name in sorted(_folders(run_dir), reverse=True):
        try:
            return check(f"{run_dir.url}/{FOLDER}/{name}", verify=verify)
        except CheckpointError:
            continue  # the next older one may be whole; `clean` removes this one and says so
    return None


def read_manifest(checkpoint: str) -> CheckpointManifest:
    """The manifest of a checkpoint. Raises CheckpointError when it is absent or not ours."""
    folder = RunDir(checkpoint)
    try:
        return CheckpointManifest.model_validate_json(folder.read_text(MANIFEST))
    except FileNotFoundError as error:
        raise CheckpointError("has no manifest: it was never finished", path=checkpoint) from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise CheckpointError(f"has a manifest that cannot be read: {error}", path=checkpoint) from error


def check(checkpoint: str, *, verify: bool = True) -> CheckpointManifest:
    """The manifest, after every file was found with its size and, with `verify`, its sha256.

    Raises CheckpointError naming the file that is missing, cut off or changed.
    """
    manifest = read_manifest(checkpoint)
    folder = RunDir(checkpoint)
    for name, entry in manifest.files.items():
        if not folder.exists(name):
            raise CheckpointError(f"lacks {name}", path=checkpoint)
        size = folder.fs.size(folder.path(name))
        if size != entry.size:
            raise CheckpointError(f"has {name} with {size} bytes instead of {entry.size}", path=checkpoint)
    if verify:
        with ThreadPoolExecutor(8) as pool:
            digests = pool.map(lambda name: sha256(folder, name), manifest.files)
            for name, digest in zip(manifest.files, digests, strict=True):
                if digest != manifest.files[name].sha256:
                    raise CheckpointError(f"has {name} with another sha256 than its manifest", path=checkpoint)
    return manifest


def clean(run_dir: RunDir) -> list[str]:
    """The names of the directories removed because no valid manifest vouches for them, newest first.

    Contents are read from the newest on until one is whole. A damaged one that is newer must go too: it would
    outlive, in `prune`, the checkpoints of the run that continues from the older one.
    """
    removed: list[str] = []
    trusted = False
    for name in sorted(_folders(run_dir), reverse=True):
        try:
            check(f"{run_dir.url}/{FOLDER}/{name}", verify=not trusted)
            trusted = True
        except CheckpointError:
            run_dir.remove(f"{FOLDER}/{name}")
            removed.append(name)
    return removed


def prune(run_dir: RunDir, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, manifest first, so that a crash in between trusts nothing."""
    for name in sorted(_folders(run_dir))[:-keep]:
        run_dir.remove(f"{FOLDER}/{name}/{MANIFEST}")
        run_dir.remove(f"{FOLDER}/{name}")


def ledger_of(manifest: CheckpointManifest) -> Ledger:
    """The rows that had been consumed."""
    return Ledger(**manifest.ledger)


def write_layout(run_dir: str, step: int, layout: str) -> FileEntry:
    """Write down how the chunk is packed that a checkpoint stands in, so that its rest can be prepared alone."""
    RunDir(run_dir).write_text(f"{folder_name(step)}/{CHUNK}", layout)
    return FileEntry(size=len(layout), sha256=hashlib.sha256(layout.encode()).hexdigest())


def read_layout(run_dir: str, manifest: CheckpointManifest) -> str | None:
    """What `write_layout` wrote for a checkpoint that was found whole; None for one that has none."""
    if CHUNK not in manifest.files:
        return None
    return RunDir(run_dir).read_text(f"{folder_name(manifest.step)}/{CHUNK}")


def load_state(checkpoint: str, state: dict[str, Any]) -> None:
    """Fill an engine's `state()` from a checkpoint, in place; every rank reads its own shards."""
    import torch.distributed.checkpoint as dcp

    dcp.load(state, storage_reader=storage_reader(checkpoint))


def load_weights(checkpoint: str) -> dict[str, torch.Tensor]:
    """Every trained tensor, whole and on the CPU, under its Hugging Face (or peft) name. No process group needed."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = storage_reader(checkpoint).read_metadata()
    weights: dict[str, torch.Tensor] = {
        key.removeprefix("model."): torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
        if key.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        # torch warns of the very thing it was told by `no_dist`.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        dcp.load({"model": weights}, storage_reader=storage_reader(checkpoint), no_dist=True)
    return weights


def storage_reader(checkpoint: str) -> Any:
    """A reader for a local folder or an fsspec URL."""
    if RunDir(checkpoint).is_local:
        from torch.distributed.checkpoint import FileSystemReader

        return FileSystemReader(RunDir(checkpoint).root)
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    return FsspecReader(checkpoint)


def storage_writer(checkpoint: str) -> Any:
    """A writer for a local folder (each file flushed to disk) or an fsspec URL."""
    if RunDir(checkpoint).is_local:
        from torch.distributed.checkpoint import FileSystemWriter

        return FileSystemWriter(RunDir(checkpoint).root, sync_files=True)
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

    return FsspecWriter(checkpoint, sync_files=False)


def sha256(folder: RunDir, name: str) -> str:
    """The sha256 (hex) of one file."""
    digest = hashlib.sha256()
    with folder.fs.open(folder.path(name), "rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def differences(manifest: CheckpointManifest, job: Job) -> list[str]:
    """How the job that made a checkpoint differs from this one in what decides its losses; none when it is the same.

    Compared as jobs and not as hashes: a setting that a newer version adds has its default in both.
    """
    try:
        before = Job.model_validate(manifest.job)
    except ValueError:
        return ["its settings are those of another version"]
    return differing_keys(before.identity(), job.identity())


def check_rows(manifest: CheckpointManifest, fingerprint: str, run_dir: str) -> None:
    """Raises CheckpointError when the rows of the stream `fingerprint` are not those the checkpoint was trained on."""
    if manifest.ledger["fingerprint"] != fingerprint:
        raise CheckpointError(
            "was made with other rows: a data file has changed since",
            path=f"{run_dir}/{folder_name(manifest.step)}",
            fix="restore the files, or give the run another name",
        )


def check_rendering(manifest: CheckpointManifest, model_path: str, run_dir: str) -> None:
    """Raises CheckpointError when rows would be rendered otherwise than those the checkpoint was trained on."""
    if others := rendered_otherwise(manifest.rendered_with, local_folder(model_path, weights=False)):
        raise CheckpointError(
            f"was made with another {', '.join(others)} in {model_path}",
            path=f"{run_dir}/{folder_name(manifest.step)}",
            fix="put it back as it was, or give the run another name",
        )


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`train.lr: 0.1 -> 0.2` for each value in which two jobs' identities differ."""
    lines: list[str] = []
    for key in sorted({*old, *new}):
        before, after = _by_index(old.get(key)), _by_index(new.get(key))
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differing_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {json.dumps(before)} -> {json.dumps(after)}")
    return lines


def _by_index(value: Any) -> Any:
    """A list of settings as a mapping, so that the one that differs is named and not the whole list."""
    if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        return {str(index): item for index, item in enumerate(value)}
    return value


def _folders(run_dir: RunDir) -> list[str]:
    return [name for name in run_dir.names(FOLDER) if name.startswith("step-")]
