"""Everything that can be wrong is found here, before a cluster is started or a file written. No torch, no Ray.

Order: model folder, data, run directory, disk. Each check raises one error that names path, value, rule and fix.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from rayswift import plugins
from rayswift.cluster import existing
from rayswift.config import deepspeed_check
from rayswift.config.job import DataSource, Job, MixingSpec, ParallelSpec
from rayswift.data.hub_sources import settled
from rayswift.data.inspect import open_sources
from rayswift.data.mixing import quotas
from rayswift.data.rendering import Rendering
from rayswift.data.sources import FileIndex
from rayswift.data.stream import StreamPlan
from rayswift.errors import ConfigError
from rayswift.models.config_sizes import num_positions
from rayswift.models.cutting import model_plan
from rayswift.models.loading import check_folder
from rayswift.planning.checks import check_layout
from rayswift.planning.layout import Layout
from rayswift.planning.model_plan import ModelPlan
from rayswift.planning.model_shape import ModelShape, shape_from_config, shape_from_folder
from rayswift.planning.refused import check_refused
from rayswift.training.checkpoint import CheckpointManifest

# What a setting needs, and the extra that installs it.
_PACKAGES = {"float8": ("torchao", "fp8"), "nf4": ("bitsandbytes", "qlora")}

_MAX_OVERSAMPLING = 1000
"""Times all rows that an epoch of repeated sources may have: beyond it a weight is a slip, and the plan too large."""


@dataclass(frozen=True)
class Prepared:
    """A job whose inputs were found good. `model_plan` looks up how the model can be cut: it takes seconds."""

    job: Job
    shape: ModelShape
    train_stream: StreamPlan
    eval_stream: StreamPlan | None
    checkpoint: CheckpointManifest | None
    model_plan: Callable[[], ModelPlan] = ModelPlan

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
    _check_packages(job)
    _check_engine(job)
    method = plugins.load("methods", job.method.name, path="method.name")
    config = check_folder(job.model.path, chat_template=method.rendering == "chat")
    _check_positions(job, config)
    check_refused(job, config)
    shape = shape_from_folder(job.model.path) if os.path.isdir(job.model.path) else shape_from_config(config)
    cuts = partial(model_plan, config)
    _check_axes(job, shape, cuts)
    train_stream = _stream(job, job.data.train, "data.train", method.rendering, epochs=job.train.epochs)
    eval_stream = _stream(job, job.data.eval, "data.eval", method.rendering, epochs=1) if job.data.eval else None
    _check_media(job, shape, (train_stream, eval_stream))
    _check_trackers(job)
    checkpoint = existing.find_checkpoint(job, train_stream)
    prepared = Prepared(job, shape, train_stream, eval_stream, checkpoint, cuts)
    if not prepared.finished:
        existing.check_disk(job, shape)
    return prepared


def _check_media(job: Job, shape: ModelShape, streams: Sequence[StreamPlan | None]) -> None:
    """Raises ConfigError for rows with media that the model has no tower for: workers would find out much later."""
    kinds = dict.fromkeys(kind for stream in streams if stream is not None for kind in stream.settings.media_kinds)
    for kind in kinds:
        if (tower := "audio" if kind == "audio" else "vision") not in shape.towers:
            takes = f"text and {' and '.join(shape.towers)}" if shape.towers else "text alone"
            raise ConfigError(f"takes {takes}, and rows have {kind}: it has no {tower} tower", path="model.path",
                              value=job.model.path, fix="use a model that takes it, or leave them out")  # fmt: skip


def _check_trackers(job: Job) -> None:
    """Raises ConfigError for a name that is no tracker; whether a tracker works is found without stopping the run."""
    for number, name in enumerate(job.logging.trackers):
        plugins.check_name("training.trackers", name, path=f"logging.trackers.{number}")


def _check_packages(job: Job) -> None:
    """Raises ConfigError for a setting whose package is not installed here: the workers would find out too late."""
    for path, value in (("model.dtype", job.model.dtype), ("model.quantization", job.model.quantization)):
        package, extra = _PACKAGES.get(value or "", ("", ""))
        if package and find_spec(package) is None:
            raise ConfigError(f"needs the package {package}, which is not installed", path=path, value=value,
                              fix=f"pip install 'rayswift[{extra}]'")  # fmt: skip


def _check_engine(job: Job) -> None:
    """Raises ConfigError for a name that is no engine, and for a DeepSpeed JSON that contradicts the job."""
    if job.parallel.engine != "auto":
        plugins.check_name("parallel.engines", job.parallel.engine, path="parallel.engine")
    if job.parallel.deepspeed is not None:
        deepspeed_check.check(job)


def _check_axes(job: Job, shape: ModelShape, cuts: Callable[[], ModelPlan]) -> None:
    """Raises PlanError for axes that this model cannot be cut along on any cluster."""
    p = job.parallel
    shard = p.ep if p.dp_shard == "auto" else p.dp_shard
    if shard % p.ep == 0:
        check_layout(job, shape, Layout(dp_shard=shard, cp=p.cp, tp=p.tp, pp=p.pp, ep=p.ep), cuts)


def _absolute(job: Job) -> Job:
    """The job with local paths made absolute, for workers run in other directories, and datasets of hubs pinned to a
    commit: the one that the run began with, if it goes on. URLs, globs and model ids stay."""
    kept = existing.kept_commits(job)
    data = job.data.model_copy(
        update={
            "train": _absolute_sources(job.data.train, "data.train", kept),
            "eval": _absolute_sources(job.data.eval, "data.eval", kept),
            "cache": None if job.data.cache is None else _absolute_path(job.data.cache),
        }
    )
    base = os.path.expanduser(job.model.path)
    model = job.model.model_copy(update={"path": os.path.abspath(base) if os.path.isdir(base) else base})
    update = {"data": data, "model": model, "output": _absolute_path(job.output)}
    return job.model_copy(update={**update, "parallel": _absolute_deepspeed(job.parallel)})


def _absolute_deepspeed(parallel: ParallelSpec) -> ParallelSpec:
    """A DeepSpeed JSON that is a file here is one for the workers of this machine too; a shorthand stays."""
    given = parallel.deepspeed
    if given is None or not os.path.isfile(os.path.expanduser(given)):
        return parallel
    return parallel.model_copy(update={"deepspeed": _absolute_path(given)})


def _absolute_sources(sources: Sequence[DataSource], path: str, kept: Mapping[str, str]) -> tuple[DataSource, ...]:
    return tuple(
        settled(source.model_copy(update={"path": _absolute_path(source.path)}), place=f"{path}.{number}", kept=kept)
        for number, source in enumerate(sources)
    )


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
    opened = open_sources(sources, path=path, kinds=job.data.media.kinds)
    held_out = path == "data.eval"
    mixing = MixingSpec() if held_out else job.data.mixing
    _check_weights(sources, opened.files, path, mixing)
    data = job.data.model_copy(update={"shuffle": False, "mixing": mixing}) if held_out else job.data
    return opened.stream(data, rendering, epochs=epochs, seed=job.train.seed)


def _check_weights(sources: Sequence[DataSource], files: Sequence[FileIndex], path: str, mixing: MixingSpec) -> None:
    """Raises ConfigError for a source whose weight leaves no row of it in an epoch."""
    counts = [sum(file.num_rows for file in files if file.source == number) for number in range(len(sources))]
    visited = quotas(counts, [source.weight for source in sources], mixing.stopping)
    if mixing.stopping == "all_exhausted" and sum(visited) > _MAX_OVERSAMPLING * sum(counts):
        last = max(range(len(sources)), key=lambda number: counts[number] / sources[number].weight)
        raise ConfigError(
            f"makes {sum(visited)} rows an epoch of {sum(counts)}, until {sources[last].path} was seen whole",
            path="data.mixing.stopping", value=mixing.stopping, fix=f"raise {path}.{last}.weight",
        )  # fmt: skip
    for number, (source, num_rows) in enumerate(zip(sources, counts, strict=True)):
        if num_rows and not visited[number]:
            shares = mixing.stopping != "weights"
            raise ConfigError(
                f"gives none of the {num_rows} rows of {source.path} in an epoch"
                + (", which ends when the first source is used up" if shares else ""),
                path=f"{path}.{number}.weight",
                value=source.weight,
                fix="raise it, or lower the others"
                if shares
                else f"use at least {1.1 / num_rows:.2g}",  # after rounding
            )
