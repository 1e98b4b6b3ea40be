"""From a run, a checkpoint or a model folder to a verified Hugging Face folder with a manifest.

Knows the order: resolve, build, probe, round, write, prove, sign, rename. The folder appears whole and proved, or not
at all.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rayswift.errors import ConfigError, ExportError
from rayswift.export import manifest as manifests
from rayswift.export.manifest import ExportManifest
from rayswift.export.merge import Merged, build
from rayswift.export.shown import encoder_of, shown
from rayswift.export.source import Source, resolve
from rayswift.export.verify import DEFAULT_BOUNDS, PROMPTS, Bounds, compare, encode, probe
from rayswift.models.adapters import weights_sha256
from rayswift.models.loading import check_folder, load_config, load_tokenizer, local_folder, quiet_progress
from rayswift.models.staging import is_empty_folder, staged_folder
from rayswift.units import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHARD_SIZE = "5GB"
_COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model"),
    *("tekken.json", "chat_template.*", "additional_chat_templates/*", "generation_config.json"),
    "*processor_config.json",
)
"""What is copied as it is: a tokenizer that is loaded and saved again may come out another one."""


def export(
    source: str,
    output: str,
    *,
    dtype: str | None = None,
    verify: bool = True,
    force: bool = False,
    bounds: Bounds | None = None,
    prompts: Sequence[str] = PROMPTS,
) -> ExportManifest:
    """The manifest of the folder written to `output` from a run, a checkpoint, an adapter folder or a model.

    `dtype` is that of the weights written; None keeps the base's. `bounds` on the log-probabilities default to
    `DEFAULT_BOUNDS` of that dtype. An existing `output` is replaced only with `force`. Raises ConfigError for a bad
    source or output, CheckpointError for a checkpoint that cannot be trusted, ExportError when the result cannot be
    written or does not verify; `output` is then as it was before.
    """
    what = resolve(source)
    for reason in what.passed_over:
        print(f"warning: passed over a newer checkpoint: {reason}", file=sys.stderr)
    check_folder(what.base)
    base = local_folder(what.base)
    _check_output(output, keep=(source, str(base)), force=force)
    base_sha256 = _check_base(what, base)
    dtype = _dtype(dtype, base)
    tokenizer = load_tokenizer(str(base))
    encoder = encoder_of(base)
    merged = build(what, [*(encode(tokenizer, text) for text in prompts), *shown(encoder).values()])
    reference = probe(merged.model, tokenizer, prompts, encoder) if verify else None
    with _disk_errors(output), staged_folder(output, replace=force) as stage:
        _write_model(merged, base, dtype, stage)
        result = compare(reference, stage, bounds or DEFAULT_BOUNDS[dtype]) if reference else None
        manifest = ExportManifest(
            base=what.base,
            base_sha256=base_sha256,
            method=what.method,
            adapter=what.adapter_settings(),
            dtype=dtype,
            job_hash=what.job_hash,
            checkpoint_step=what.step,
            run_finished=what.finished,
            versions=manifests.current_versions(),
            merge=merged.change,
            verify=result,
            files=manifests.describe_files(stage),
        )
        manifests.write(manifest, stage)
    return manifest


def _check_output(output: str, *, keep: Sequence[str], force: bool) -> None:
    """Raises ConfigError unless `output` may be written, and, with `force`, is something that exports replace."""
    place = os.path.realpath(output)
    if any(_contains(place, kept) for kept in keep):
        raise ConfigError("would overwrite what is exported", path="OUTPUT", value=output, fix="name another folder")
    if not os.path.lexists(output) or is_empty_folder(output):
        return
    if not force:
        raise ConfigError("exists", path="OUTPUT", value=output, fix="name another folder, or replace it with --force")
    try:
        manifests.read(output)  # many a folder of other people's has a config.json
    except ExportError as error:
        raise ConfigError(
            "is not an earlier export, and is not replaced", path="OUTPUT", value=output, fix="name another folder"
        ) from error


def _contains(folder: str, path: str) -> bool:
    """Whether the local `path` is `folder` or lies below it. False for URLs and hub ids."""
    return os.path.exists(path) and Path(os.path.realpath(path)).is_relative_to(folder)


def _check_base(what: Source, base: Path) -> str:
    """The identity of the base's weights. Raises ExportError when they are not those it was trained on."""
    found = weights_sha256(base)
    if what.base_sha256 is not None and what.base_sha256 != found:
        raise ExportError(
            f"has changed since {what.checkpoint or what.adapter_dir} was trained on it",
            path="model.path",
            value=what.base,
            fix="put the base back as it was",
        )
    return found


def _dtype(asked: str | None, base: Path) -> str:
    """The dtype to write: as asked, else the base's, else float32. Raises ConfigError for one that is not known."""
    stored = str(load_config(str(base)).dtype or "float32").removeprefix("torch.")
    dtype = asked or (stored if stored in DEFAULT_BOUNDS else "float32")
    if dtype not in DEFAULT_BOUNDS:
        raise ConfigError("is not a dtype", path="--dtype", value=dtype, fix=f"use {', '.join(DEFAULT_BOUNDS)}")
    return dtype


def _write_model(merged: Merged, base: Path, dtype: str, stage: Path) -> None:
    """Weights, config, tokenizer, template and generation settings."""
    import torch

    model = merged.model
    torch.nn.Module.to(model, getattr(torch, dtype))
    _check_space(model, stage)
    _restore_cache(model, base)
    with quiet_progress():
        model.save_pretrained(stage, max_shard_size=_SHARD_SIZE)
    for pattern in _COMPANIONS:
        for file in filter(Path.is_file, base.glob(pattern)):
            target = stage / file.relative_to(base)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def _restore_cache(model: PreTrainedModel, base: Path) -> None:
    """What the base's config says of the cache: off is for training only."""
    before = load_config(str(base))
    for config, own in ((model.config, before), (model.config.get_text_config(), before.get_text_config())):
        config.use_cache = getattr(own, "use_cache", True)


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


@contextmanager
def _disk_errors(output: str) -> Iterator[None]:
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
