"""What lies in the run directory already, and whether this job may go on from it. No torch, no Ray, nothing written.

A run is one job: what another one has trained, or what was trained on other rows, is never continued. A job that
failed before its first step has left nothing to protect, and may be corrected under the same name.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import yaml

from rayswift.config.job import Job, is_hub_dataset
from rayswift.data.hub_sources import commit_of, unpinned
from rayswift.data.stream import StreamPlan
from rayswift.errors import ConfigError, PlanError
from rayswift.planning.memory import checkpoint_bytes
from rayswift.planning.model_shape import ModelShape
from rayswift.training.checkpoint import (
    FOLDER,
    CheckpointManifest,
    check_rendering,
    check_rows,
    differences,
    differing_keys,
    find_newest,
)
from rayswift.training.run_dir import METRICS, RunDir
from rayswift.units import format_bytes


def find_checkpoint(job: Job, train_stream: StreamPlan) -> CheckpointManifest | None:
    """The checkpoint this job goes on from, None for a fresh start.

    Raises ConfigError when the run is another job's, or `train.resume` does not allow what is there, and
    CheckpointError when the rows, or what they are rendered with, have changed since.
    """
    run_dir = RunDir(job.run_dir)
    found = find_newest(run_dir, verify=False)
    if job.train.resume == "never" and (found is not None or run_dir.exists("job.yaml")):
        raise ConfigError("exists already", path="run", value=job.run_dir, fix="give the job another name")
    if job.train.resume == "must" and found is None:
        raise ConfigError(
            "asks to continue, but the run has no valid checkpoint",
            path="train.resume",
            value="must",
            fix=f"use train.resume=auto, or check {job.run_dir}",
        )
    _check_same_job(job, found, run_dir)
    if found is not None:
        check_rows(found, train_stream.fingerprint, job.run_dir)
        check_rendering(found, job.model.path, job.run_dir)
    return found


def kept_commits(job: Job) -> dict[str, str]:
    """The commits that the run of this name has trained on, by the hub dataset that stood at it.

    A run goes on with them, wherever the branch has moved since: other rows would not be the run's.
    """
    given = (*job.data.train, *job.data.eval)
    if not any(is_hub_dataset(source.path) or source.dataset is not None for source in given):
        return {}
    found = find_newest(RunDir(job.run_dir), verify=False)
    data = found.job.get("data", {}) if found is not None else {}
    paths = [str(source["path"]) for part in ("train", "eval") for source in data.get(part) or ()]
    commits = {unpinned(path): commit_of(path) for path in paths if is_hub_dataset(path)}
    return {source: commit for source, commit in commits.items() if commit is not None}


def check_disk(job: Job, shape: ModelShape) -> None:
    """Raises ConfigError for an output that cannot be written, PlanError when its disk cannot hold the checkpoints.

    Those that lie there already are pruned as new ones come, so their room counts as free.
    """
    run_dir = RunDir(job.run_dir)
    if not run_dir.is_local:
        return
    folder = Path(run_dir.root)
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError("cannot be written to", path="output", value=job.output, fix="choose another folder")
    needed = (job.train.keep_checkpoints + 1) * checkpoint_bytes(shape, job)
    free = shutil.disk_usage(folder).free + _size_bytes(Path(run_dir.path(FOLDER)))
    if free < needed:
        raise PlanError(
            f"has {format_bytes(free)} free, but {job.train.keep_checkpoints} checkpoints and one being written take "
            f"{format_bytes(needed)}",
            path="output",
            value=job.output,
            fix="free some space, choose another folder, or lower train.keep_checkpoints",
        )


def _check_same_job(job: Job, found: CheckpointManifest | None, run_dir: RunDir) -> None:
    """Raises ConfigError when another job has trained here."""
    if found is not None:
        changes = differences(found, job)
    elif any(record["step"] for record in run_dir.read_jsonl(METRICS)):
        changes = _changes_since_written(job, run_dir)
    else:
        return
    if changes:
        raise ConfigError(
            f"is a run of a different job ({'; '.join(changes)})",
            path="run",
            value=job.run_dir,
            fix="give this job another name, or use the settings the run was started with",
        )


def _changes_since_written(job: Job, run_dir: RunDir) -> list[str]:
    """How job.yaml differs from this job."""
    try:
        before = Job.model_validate(yaml.safe_load(run_dir.read_text("job.yaml")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"cannot be read: {error}", path=f"{job.run_dir}/job.yaml", fix="give the job another name"
        ) from error
    if os.path.isdir(job.model.path):
        # job.yaml has the path as it was typed, and from this directory it may look like a hub id. Whether the
        # folder holds the same weights is known by their hash.
        name = os.path.basename(before.model.path.rstrip("/"))
        before = before.model_copy(update={"model": before.model.model_copy(update={"path": name})})
    return differing_keys(before.identity(), job.identity())


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
