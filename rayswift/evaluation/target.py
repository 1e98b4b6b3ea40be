"""From a target on disk to one model in float32: what an export of it would hold, without writing it.

Knows runs, checkpoints, adapters and model folders through `export/`; knows no endpoint and no rows.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from pydantic import ValidationError

from rayswift import plugins
from rayswift.config.job import Job
from rayswift.errors import CheckpointError, ConfigError
from rayswift.evaluation.report import Kind
from rayswift.export.base import check_base
from rayswift.export.kept import lineage_of, manifest_name
from rayswift.export.merge import build
from rayswift.export.source import Source, resolve
from rayswift.export.verify import PROMPTS, encode
from rayswift.models.config_sizes import num_positions
from rayswift.models.loading import check_folder, load_tokenizer, local_folder
from rayswift.parallel.mesh import find_device

if TYPE_CHECKING:
    from typing import Any

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def opened(target: str) -> tuple[Source, Kind]:
    """What lies at `target`, and what it is; an export with the data of its job.

    Raises as `export.source.resolve`, ConfigError for a broken base.
    """
    source = _with_data(resolve(target, field="TARGET"), target)
    for reason in source.passed_over:
        print(f"warning: passed over a newer checkpoint: {reason}", file=sys.stderr)
    check_folder(source.base, read_only=True)
    if source.checkpoint is not None:
        return source, "checkpoint" if source.checkpoint == target else "run"
    if source.adapter_dir is not None:
        return source, "adapter"
    return source, "export" if manifest_name(target) is not None else "model"


def _with_data(source: Source, target: str) -> Source:
    """An export, or an adapter exported alone, with what the job behind it says of its data; any other as it is."""
    lineage = lineage_of(target)
    if lineage is None:
        return source
    try:
        job = Job.model_validate(lineage.job)
        rendering = plugins.load("methods", job.method.name, path="method.name").rendering
    except (ValidationError, ConfigError) as error:
        reason = " ".join(str(error).split())[:200]
        print(f"warning: rows are read as for a model of no job: that of {target} is none here: {reason}",
              file=sys.stderr)  # fmt: skip
        return source
    return replace(source, data=job.data, rendering=rendering)


def longest(source: Source, asked: int | None, default: int) -> int:
    """The longest sequence: as asked for, else the job's own, else the default, and what the model takes.

    Raises ConfigError when it is asked for more than that.
    """
    positions = num_positions(check_folder(source.base, read_only=True))
    if asked is not None and positions is not None and asked > positions:
        raise ConfigError("is more than the model has positions", path="--max-length", value=asked,
                          fix=f"use {positions}")  # fmt: skip
    own = source.data.max_length if source.data is not None else default
    return min(asked or own, positions or sys.maxsize)


def load(source: Source) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, its adapter merged, on the device there is, and its tokenizer.

    Raises CheckpointError when the base is no longer the one that was trained on, or renders rows otherwise.
    """
    base = local_folder(source.base)
    check_base(source, base, error=CheckpointError)
    tokenizer = load_tokenizer(str(base))
    model = build(source, [encode(tokenizer, text) for text in PROMPTS]).model
    # `to` of transformers is wrapped in a way that loses its signature
    return cast("Any", model).to(find_device("auto")).eval(), tokenizer
