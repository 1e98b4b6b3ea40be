"""From a run, a checkpoint or a model folder to a verified Hugging Face folder with a manifest.

Knows the order: resolve, build, probe, round, write, prove, sign, rename. The folder appears whole and proved, or not
at all.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rayswift.errors import ConfigError, ExportError
from rayswift.export import embedding, speed
from rayswift.export import manifest as manifests
from rayswift.export.base import check_base, check_rounds_once
from rayswift.export.card import write_card
from rayswift.export.evaluations import evaluations_of
from rayswift.export.manifest import ExportManifest
from rayswift.export.measured import Quantization, VerifyResult
from rayswift.export.merge import build
from rayswift.export.quantize import load_quantizer, write_ignored
from rayswift.export.quantize import quantize as quantize_model
from rayswift.export.rows import Chosen, choose
from rayswift.export.served import ENGINE_BOUNDS, Prover, check_engine, prover
from rayswift.export.shown import encoder_of, shown
from rayswift.export.source import Source, resolve
from rayswift.export.terms import DEFAULT_BOUNDS, Bounds, QuantizeSpec
from rayswift.export.verify import PROMPTS, Probe, compare, encode, probe
from rayswift.export.written import check_place, disk_errors, write_model
from rayswift.models.adapters import ADAPTER_CONFIG
from rayswift.models.folder import packing_of, stored_dtype
from rayswift.models.loading import check_folder, load_config, load_tokenizer, local_folder
from rayswift.models.pooling import read_pooling
from rayswift.models.quantized import unquantized
from rayswift.models.rounding import round_weights
from rayswift.models.staging import is_empty_folder, staged_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rayswift.data.media.encoder import MediaEncoder
    from rayswift.export.quantizers import Quantizer
    from rayswift.training.run_dir import RunDir


def export(
    source: str,
    output: str,
    *,
    dtype: str | None = None,
    verify: bool = True,
    force: bool = False,
    bounds: Bounds | None = None,
    prompts: Sequence[str] = PROMPTS,
    quantize: QuantizeSpec | None = None,
    engine: str = "auto",
    max_difference: float | None = None,
    engine_bound: float | None = None,
    max_perplexity: float | None = None,
    num_held_out: int | None = None,
) -> ExportManifest:
    """The manifest of the folder written to `output` from a run, a checkpoint, an adapter folder or a model.

    `dtype` is that of the weights written, or of what a quantizer leaves; None keeps the base's. `bounds` default to
    `DEFAULT_BOUNDS` of that dtype, or the quantizer's; `max_difference` takes the place of their `mean_abs`. `engine`
    is the serving engine that has to answer from the folder too: vllm, local, none, or auto, which is the one that
    `auto` of an endpoint takes here; `engine_bound` is for the mean difference of its log-probabilities from
    transformers'. With an engine, a quantized model's speed is measured beside the unquantized one's, both in `local`,
    which no other engine has to be started for. `max_perplexity` bounds the
    perplexity on `num_held_out` rows of the job, as a ratio to the trained model's; where neither is given and the rows
    cannot be read any more, that is told. An embedding model is copied and asked for its vectors: of the options it
    takes `force` and `prompts`, its texts. An existing `output` is replaced only with `force`. Raises ConfigError for a
    bad source or output, CheckpointError for a checkpoint that cannot be trusted, ExportError when the result cannot be
    written or does not verify, RaySwiftError when `output` may not be replaced any more at the end, with the place that
    the finished folder stays in; `output` is then as it was before.
    """
    quantizer = load_quantizer(quantize) if quantize else None
    what = resolve(source)
    for reason in what.passed_over:
        print(f"warning: passed over a newer checkpoint: {reason}", file=sys.stderr)
    check_folder(what.base)
    base = local_folder(what.base)
    check_output(output, keep=(source, str(base)), force=force)
    if quantize:
        check_rounds_once(what, base, quantize.name)
    base_sha256 = check_base(what, base)
    if what.is_plain and read_pooling(str(base), field="SOURCE") is not None:
        _refuse(quantizer=quantize.name if quantize else None, dtype=dtype, max_difference=max_difference,
                max_perplexity=max_perplexity, engine=engine if engine in ("vllm", "local") else None)  # fmt: skip
        check_engine(engine)
        return _export_embedding(what, base, base_sha256, output, prompts, force=force)
    dtype = _dtype(dtype, base, is_quantized=quantize is not None)
    encoder = encoder_of(base)
    by = _prover(engine, base, engine_bound, quantizer, dtype, encoder) if verify else None
    tokenizer = load_tokenizer(str(base))
    rows = Chosen()
    if quantize or verify:
        rows = choose(what, tokenizer, quantize, needs_rows=quantizer is not None and quantizer.needs_rows,
                      num_held_out=num_held_out, is_bounded=max_perplexity is not None)  # fmt: skip
    merged = build(what, [*(encode(tokenizer, text) for text in prompts), *shown(encoder).values()])
    merged = replace(merged, model=unquantized(merged.model, was_packed=packing_of(base) is not None))
    asks = by is not None or quantizer is not None
    reference = probe(merged.model, tokenizer, prompts, encoder, rows.held_out, greedy=asks) if verify else None
    bounds = bounds or (quantize.bounds(quantizer.bounds) if quantize and quantizer else DEFAULT_BOUNDS[dtype])
    bounds = bounds.with_mean(max_difference).with_perplexity(max_perplexity)
    job = _Job(base, dtype, tokenizer, quantize, quantizer, by, bounds)
    with disk_errors(output), staged_folder(output, replace=force, check=manifests.read) as stage:
        done, result = _written(job, merged.model, reference, rows, stage)
        manifest = _manifest(what, base_sha256, job, done, result).model_copy(update={"merge": merged.change})
        return _signed(manifest, what.run, output, stage)


def _manifest(
    what: Source, base_sha256: str, job: _Job, done: Quantization | None, result: VerifyResult | None
) -> ExportManifest:
    """What is known of a trained model's folder, but for the merge and the files."""
    return ExportManifest(
        base=what.base,
        base_sha256=base_sha256,
        method=what.method,
        adapter=what.adapter_settings(),
        quantizer=job.quantize.name if job.quantize else "none",
        quantization=done,
        dtype=job.dtype,
        job_hash=what.job_hash,
        checkpoint_step=what.step,
        run_finished=what.finished,
        lineage=what.lineage,
        earlier=what.earlier,
        evaluations=evaluations_of(what.run, what.step),
        versions=manifests.current_versions(),
        merge=None,
        verify=result,
        files={},
    )


@dataclass(frozen=True)
class _Job:
    """What is written, and how it is to be proved."""

    base: Path
    dtype: str
    tokenizer: PreTrainedTokenizerBase
    quantize: QuantizeSpec | None
    quantizer: Quantizer | None
    by: Prover | None
    bounds: Bounds


def _written(
    job: _Job, model: PreTrainedModel, reference: Probe | None, rows: Chosen, stage: Path
) -> tuple[Quantization | None, VerifyResult | None]:
    """The model in `stage`, rounded and quantized in place, and what was proved of it against the reference."""
    import torch

    round_weights(model, str(job.base), getattr(torch, job.dtype))
    done = before = None
    if job.quantize and job.quantizer and rows.calibration:
        if reference and job.by:
            before = speed.unquantized(model, job.base, job.dtype, reference.ids)
        done = quantize_model(model, job.tokenizer, job.quantize, job.quantizer, rows.calibration)
    write_model(model, job.base, stage)
    if done:
        write_ignored(stage, done)
    if reference is None:
        return done, None
    result = compare(reference, stage, job.bounds, job.by).model_copy(update={"held_out_reason": rows.unread})
    if done:
        compared = speed.beside(before, result.served, stage, reference.ids, done.bytes_before)
        result = result.model_copy(update={"speed": compared})
    return done, result


def _prover(
    engine: str, base: Path, bound: float | None, quantizer: Quantizer | None, dtype: str, encoder: MediaEncoder | None
) -> Prover | None:
    """The serving engine to prove in; why it is not vLLM is told."""
    own = quantizer.bounds.engine if quantizer else None
    bound = next(one for one in (bound, own, ENGINE_BOUNDS[dtype]) if one is not None)
    is_packed = quantizer is not None and quantizer.is_packed
    by, note = prover(engine, base, bound, is_packed=is_packed, encoder=encoder)
    if note:
        print(f"note: {note}", file=sys.stderr)
    return by


def _refuse(**given: str | float | None) -> None:
    """Raises ConfigError for an option that an embedding model has no use for."""
    for name, value in given.items():
        if value is not None:
            raise ConfigError("is for models that answer with text; an embedding model is exported as it is",
                              path=name, value=value, fix="leave it out")  # fmt: skip


def _export_embedding(
    what: Source, base: Path, base_sha256: str, output: str, texts: Sequence[str], *, force: bool
) -> ExportManifest:
    """An embedding model's folder with a manifest."""
    with disk_errors(output), staged_folder(output, replace=force, check=manifests.read) as stage:
        embedding.copy(base, stage)
        manifest = ExportManifest(
            base=what.base,
            base_sha256=base_sha256,
            method=None,
            adapter=None,
            dtype=stored_dtype(base) or "unknown",
            job_hash=None,
            checkpoint_step=None,
            earlier=what.earlier,
            versions=manifests.current_versions(),
            merge=None,
            verify=None,
            vectors=embedding.compare(base, stage, texts),
            files={},
        )
        return _signed(manifest, None, output, stage)


def _signed(manifest: ExportManifest, run: RunDir | None, output: str, stage: Path) -> ExportManifest:
    """The manifest with every file of the folder, written into it with the model card."""
    write_card(manifest, os.path.basename(os.path.abspath(output)), run, stage)
    manifest = manifest.model_copy(update={"files": manifests.describe_files(stage)})
    manifests.write(manifest, stage)
    return manifest


def check_output(
    output: str, *, keep: Sequence[str], force: bool, read: Callable[[str], object] = manifests.read
) -> None:
    """Raises ConfigError unless `output` may be written, and, with `force`, is something that exports replace.

    `read` raises ExportError for what it is not.
    """
    place = os.path.realpath(output)
    if any(_contains(place, kept) for kept in keep):
        raise ConfigError("would overwrite what is exported", path="OUTPUT", value=output, fix="name another folder")
    inside = next((kept for kept in keep if Path(place).is_relative_to(os.path.realpath(kept))), None)
    if inside is not None and _is_of_a_model(inside):
        raise ConfigError(f"lies in {inside}, which would hold what is not its own", path="OUTPUT", value=output,
                          fix="name a folder beside it")  # fmt: skip
    if not os.path.lexists(output) or is_empty_folder(output):
        check_place(output, field="OUTPUT")
        return
    if not force:
        raise ConfigError("exists", path="OUTPUT", value=output, fix="name another folder, or replace it with --force")
    try:
        read(output)  # many a folder of other people's has a config.json
    except ExportError as error:
        raise ConfigError(
            "is not an earlier export, and is not replaced", path="OUTPUT", value=output, fix="name another folder"
        ) from error


def _contains(folder: str, path: str) -> bool:
    """Whether the local `path` is `folder` or lies below it. False for URLs and hub ids."""
    return os.path.exists(path) and Path(os.path.realpath(path)).is_relative_to(folder)


def _is_of_a_model(folder: str) -> bool:
    """Whether a local folder is a model or an adapter, exported or not; a run is neither, and may hold exports."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("config.json", ADAPTER_CONFIG))


def _dtype(asked: str | None, base: Path, *, is_quantized: bool = False) -> str:
    """The dtype to write: as asked, else the base's, else float32, or bfloat16 for what a quantizer leaves.

    Raises ConfigError for one that is not known, and for float32 beside quantized weights, which no engine runs.
    """
    if is_quantized and asked == "float32":
        raise ConfigError(
            "is no type for what is not quantized: serving engines run quantized layers in half precision",
            path="--dtype", value=asked, fix="use bfloat16 or float16",
        )  # fmt: skip
    stored = str(load_config(str(base)).dtype or "float32").removeprefix("torch.")
    dtype = asked or (stored if stored in DEFAULT_BOUNDS else "float32")
    dtype = "bfloat16" if is_quantized and dtype == "float32" else dtype
    if dtype not in DEFAULT_BOUNDS:
        raise ConfigError("is not a dtype", path="--dtype", value=dtype, fix=f"use {', '.join(DEFAULT_BOUNDS)}")
    return dtype
