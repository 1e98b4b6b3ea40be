"""Everything that can be wrong is found here, before a cluster is started or a file written. No torch, no Ray.

Order: model folder, data, run directory, disk. Each check raises one error that names path, value, rule and fix.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rayswift import plugins
from rayswift.config.job import DataSource, Job
from rayswift.data.inspect import preflight
from rayswift.data.rendering import Rendering
from rayswift.data.sources import FileIndex, index_sources
from rayswift.data.stream import StreamPlan, plan_stream
from rayswift.errors import ConfigError, PlanError
from rayswift.models.config_sizes import num_positions
from rayswift.models.loading import check_folder
from rayswift.planning.memory import checkpoint_bytes
from rayswift.planning.model_shape import ModelShape, shape_from_config, shape_from_folder
from rayswift.training.checkpoint import CheckpointManifest, differing_keys, find_newest
from rayswift.training.run_dir import RunDir
from rayswift.units import format_bytes


@dataclass(frozen=True)
class Prepared:
    """A job whose inputs were found good."""

    job: Job
    shape: ModelShape
    train_stream: StreamPlan
    eval_stream: StreamPlan | None
    checkpoint: CheckpointManifest | None

    @property
    def finished(self) -> bool:
        """Whether the run has already come to the end this job asks for."""
        if self.checkpoint is None or not self.checkpoint.finished:
            return False
        asked, done = self.job.train, self.checkpoint.job["train"]
        return (asked.max_steps, asked.epochs) == (done["max_steps"], done["epochs"])


def prepare(job: Job) -> Prepared:
    """The job's inputs, checked. Raises ConfigError, DataError or PlanError; nothing is written."""
    job = _absolute(job)
    method = plugins.load("methods", job.method.name, path="method.name")
    config = check_folder(job.model.path, chat_template=method.rendering == "chat")
    _check_positions(job, config)
    shape = shape_from_folder(job.model.path) if os.path.isdir(job.model.path) else shape_from_config(config)
    train_stream = _stream(job, job.data.train, "data.train", method.rendering, epochs=job.train.epochs)
    eval_stream = _stream(job, job.data.eval, "data.eval", method.rendering, epochs=1) if job.data.eval else None
    checkpoint = _check_run(job)
    _check_disk(job, shape)
    return Prepared(job, shape, train_stream, eval_stream, checkpoint)


def _absolute(job: Job) -> Job:
    """The job with local paths made absolute: workers run in other directories. URLs, globs and hub ids stay."""
    data = job.data.model_copy(
        update={
            "train": tuple(map(_absolute_source, job.data.train)),
            "eval": tuple(map(_absolute_source, job.data.eval)),
        }
    )
    base = os.path.expanduser(job.model.path)
    model = job.model.model_copy(update={"path": os.path.abspath(base) if os.path.isdir(base) else base})
    return job.model_copy(update={"data": data, "model": model, "output": _absolute_path(job.output)})


def _absolute_source(source: DataSource) -> DataSource:
    return source.model_copy(update={"path": _absolute_path(source.path)})


def _absolute_path(path: str) -> str:
    return path if "://" in path or "::" in path else os.path.abspath(os.path.expanduser(path))


def _check_positions(job: Job, config: Mapping[str, Any]) -> None:
    """Raises ConfigError when sequences may be longer than the table of positions: the step would fail in a lookup."""
    positions = num_positions(config)
    if positions is not None and job.data.max_length > positions:
        name = (config.get("architectures") or [config["model_type"]])[0]
        raise ConfigError(f"is more than the {positions} positions of {name}", path="data.max_length",
                          value=job.data.max_length, fix=f"use {positions}")  # fmt: skip


def _stream(job: Job, sources: tuple[DataSource, ...], path: str, rendering: Rendering, *, epochs: int) -> StreamPlan:
    files = index_sources(sources, path=path)
    formats = preflight(sources, files, path=path)
    _check_weights(sources, files, path)
    held_out = path == "data.eval"
    return plan_stream(
        files,
        sources,
        formats,
        data=job.data.model_copy(update={"shuffle": False}) if held_out else job.data,
        rendering=rendering,
        epochs=epochs,
        seed=job.train.seed,
    )


def _check_weights(sources: Sequence[DataSource], files: Sequence[FileIndex], path: str) -> None:
    """Raises ConfigError for a source whose weight leaves no row of it in an epoch."""
    for number, source in enumerate(sources):
        num_rows = sum(file.num_rows for file in files if file.source == number)
        if num_rows and num_rows * source.weight < 1 - 1e-9:
            raise ConfigError(
                f"gives none of the {num_rows} rows of {source.path} in an epoch",
                path=f"{path}.{number}.weight",
                value=source.weight,
                fix=f"use at least {1.1 / num_rows:.2g}",  # above 1 / num_rows after rounding
            )


def _check_run(job: Job) -> CheckpointManifest | None:
    """The checkpoint the run continues from. Raises ConfigError for a run of the same name that is another job."""
    run_dir = RunDir(job.run_dir)
    existing = run_dir.exists("job.yaml")
    if existing and job.train.resume == "never":
        raise ConfigError("exists already", path="run", value=job.run_dir, fix="give the job another name")
    if existing:
        _check_same_job(job, run_dir)
    found = find_newest(run_dir, verify=False) if existing else None
    if found is None and job.train.resume == "must":
        raise ConfigError(
            "asks to continue, but the run has no valid checkpoint",
            path="train.resume",
            value="must",
            fix=f"use train.resume=auto, or check {job.run_dir}",
        )
    return found


def _check_same_job(job: Job, run_dir: RunDir) -> None:
    try:
        before = Job.model_validate(yaml.safe_load(run_dir.read_text("job.yaml")))
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"cannot be read: {error}", path=f"{job.run_dir}/job.yaml", fix="give the job another name"
        ) from error
    if os.path.isdir(job.model.path):
        # job.yaml has the path as it was typed, and from this directory it may look like a hub id. Whether the
        # folder holds the same weights is known by their hash.
        name = os.path.basename(before.model.path.rstrip("/"))
        before = before.model_copy(update={"model": before.model.model_copy(update={"path": name})})
    if before.job_hash() != job.job_hash():
        changes = differing_keys(before.identity(), job.identity())
        raise ConfigError(
            f"is a run of a different job ({'; '.join(changes)})",
            path="run",
            value=job.run_dir,
            fix="give this job another name, or use the settings the run was started with",
        )


def _check_disk(job: Job, shape: ModelShape) -> None:
    """Raises ConfigError for an output that cannot be written, PlanError when its disk cannot hold the checkpoints."""
    run_dir = RunDir(job.run_dir)
    if not run_dir.is_local:
        return
    folder = Path(run_dir.root)
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError("cannot be written to", path="output", value=job.output, fix="choose another folder")
    needed = (job.train.keep_checkpoints + 1) * checkpoint_bytes(shape, job)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PlanError(
            f"has {format_bytes(free)} free, but {job.train.keep_checkpoints} checkpoints and one being written take "
            f"{format_bytes(needed)}",
            path="output",
            value=job.output,
            fix="free some space, choose another folder, or lower train.keep_checkpoints",
        )
