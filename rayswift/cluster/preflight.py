"""Everything that can be wrong is found here, before a cluster is started or a file written. No torch, no Ray.

Order: model folder, data, run directory, disk. Each check raises one error that names path, value, rule and fix.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayswift import plugins
from rayswift.cluster import existing
from rayswift.config.job import DataSource, Job
from rayswift.data.inspect import preflight
from rayswift.data.rendering import Rendering
from rayswift.data.sources import FileIndex, index_sources
from rayswift.data.stream import StreamPlan, plan_stream
from rayswift.errors import ConfigError
from rayswift.models.config_sizes import num_positions
from rayswift.models.loading import check_folder
from rayswift.planning.model_shape import ModelShape, shape_from_config, shape_from_folder
from rayswift.training.checkpoint import CheckpointManifest


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
    """The job's inputs, checked. Raises ConfigError, DataError, CheckpointError or PlanError; nothing is written."""
    job = _absolute(job)
    method = plugins.load("methods", job.method.name, path="method.name")
    config = check_folder(job.model.path, chat_template=method.rendering == "chat")
    _check_positions(job, config)
    shape = shape_from_folder(job.model.path) if os.path.isdir(job.model.path) else shape_from_config(config)
    train_stream = _stream(job, job.data.train, "data.train", method.rendering, epochs=job.train.epochs)
    eval_stream = _stream(job, job.data.eval, "data.eval", method.rendering, epochs=1) if job.data.eval else None
    _check_trackers(job)
    prepared = Prepared(job, shape, train_stream, eval_stream, existing.find_checkpoint(job, train_stream))
    if not prepared.finished:
        existing.check_disk(job, shape)
    return prepared


def _check_trackers(job: Job) -> None:
    """Raises ConfigError for a name that is no tracker; whether a tracker works is found without stopping the run."""
    for number, name in enumerate(job.logging.trackers):
        plugins.check_name("training.trackers", name, path=f"logging.trackers.{number}")


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
