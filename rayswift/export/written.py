"""The files of a model folder on their way to a disk: weights and what belongs to them, if there is room."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift.errors import ConfigError, ExportError
from rayswift.models.hub_names import write_hub_names
from rayswift.models.loading import load_config
from rayswift.models.quiet import quiet_progress
from rayswift.units import format_bytes

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

_SHARD_SIZE = "5GB"
_COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model"),
    *("tekken.json", "chat_template.*", "additional_chat_templates/*", "*processor_config.json"),
    "generation_config.json",
)
"""What is copied as it is, other tools' files too: a tokenizer that is loaded and saved may come out another one."""

_DATA = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_VERSIONED = re.compile(r"tokenizer\.model\.v\d+m?\d*")
"""Mistral's, such as `tokenizer.model.v3` and `tokenizer.model.v11m1`."""


def write_model(model: PreTrainedModel, base: Path, stage: Path) -> None:
    """Weights, config, tokenizer, template and generation settings."""
    _check_space(model, stage)
    _restore_cache(model, base)
    _settle_generation(model)
    _tell_dtype(model.config, model.dtype)
    with quiet_progress(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")  # of a quantizer
        model.save_pretrained(stage, max_shard_size=_SHARD_SIZE)
    write_hub_names(stage)
    for pattern in _COMPANIONS:
        for file in filter(_is_data, base.glob(pattern)):
            target = stage / file.relative_to(base)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def _is_data(file: Path) -> bool:
    """Whether it is a file that nothing runs: `tokenizer*` are also code and pickles."""
    return file.is_file() and (file.suffix in _DATA or _VERSIONED.fullmatch(file.name) is not None)


def _restore_cache(model: PreTrainedModel, base: Path) -> None:
    """What the base's config says of the cache: off is for training only."""
    before = load_config(str(base))
    for config, own in ((model.config, before), (model.config.get_text_config(), before.get_text_config())):
        config.use_cache = getattr(own, "use_cache", True)


def _tell_dtype(config: PretrainedConfig, dtype: torch.dtype) -> None:
    """Let the configs inside a config say the type of the weights too: saving sets that of the outermost alone."""
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if inner is not None:
            inner.dtype = dtype
            _tell_dtype(inner, dtype)


def _settle_generation(model: PreTrainedModel) -> None:
    """Leave only the tokens of generation settings that transformers reads and refuses to write.

    Such as a temperature without sampling. The base's own file is copied as it is.
    """
    from transformers import GenerationConfig

    own: Any = model.generation_config
    try:
        if own is not None:
            own.validate(strict=True)
    except ValueError:
        model.generation_config = GenerationConfig(
            bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
        )


def _check_space(model: PreTrainedModel, stage: Path) -> None:
    """Raises ExportError when the weights alone are more than what is free."""
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    free = shutil.disk_usage(stage).free
    if needed > free:
        raise ExportError(
            f"needs {format_bytes(needed)}, of which {format_bytes(free)} are free",
            path="OUTPUT",
            value=str(stage.parent),
            fix="make room or name a folder on another disk",
        )


def check_place(folder: str, *, field: str) -> None:
    """Raises ConfigError where no folder can be made at a local path, before the work that it is to hold."""
    place = Path(os.path.abspath(folder))
    nearest = next(one for one in (place, *place.parents) if os.path.lexists(one))
    if not nearest.is_dir():
        raise ConfigError(f"cannot be made: {nearest} is no folder", path=field, value=folder, fix="name another one")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot be written: {nearest} is not yours to write in", path=field, value=folder,
                          fix="name another one")  # fmt: skip


@contextmanager
def disk_errors(output: str) -> Iterator[None]:
    """Turns a full disk, a missing permission and the like into an ExportError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ExportError(
            f"could not be written: {reason}",
            path="OUTPUT",
            value=output,
            fix="make room or name a folder on another disk; nothing was left there",
        ) from error
