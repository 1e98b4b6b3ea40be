"""An adapter by itself: a run's LoRA as a peft folder that names its base by hash, proved by reading it back.

What serving loads beside a model. Knows the order: resolve, build, probe, write, prove, sign, rename.
"""

from __future__ import annotations

import sys

from rayswift.errors import ConfigError, ExportError
from rayswift.export import manifest as manifests
from rayswift.export.adapter_record import RECORD, AdapterManifest, read
from rayswift.export.base import check_base
from rayswift.export.merge import adapt
from rayswift.export.pipeline import check_output
from rayswift.export.source import resolve
from rayswift.export.terms import DEFAULT_BOUNDS
from rayswift.export.verify import PROMPTS, difference, encode, logprobs_of
from rayswift.export.written import disk_errors
from rayswift.models.adapter_folder import attach_adapter
from rayswift.models.adapters import load_base, write_adapter
from rayswift.models.loading import check_folder, load_tokenizer, local_folder
from rayswift.models.staging import staged_folder


def export_adapter(source: str, output: str, *, force: bool = False) -> AdapterManifest:
    """The manifest of the adapter folder written to `output` from a LoRA run, one of its checkpoints, or an adapter.

    An existing `output` is replaced only with `force`, and only if it is such a folder. Raises ConfigError for a source
    without an adapter or an output that is something else, ExportError when the result does not verify, RaySwiftError
    as `export` does for an output that has come meanwhile; `output` is then as it was before.
    """
    what = resolve(source)
    if what.adapter is None and what.adapter_dir is None:
        raise ConfigError(
            "has no adapter: all of the model was trained, or it is a model", path="SOURCE", value=source,
            fix="export it without --adapter-only",
        )  # fmt: skip
    for reason in what.passed_over:
        print(f"warning: passed over a newer checkpoint: {reason}", file=sys.stderr)
    check_folder(what.base)
    check_output(output, keep=(source,), force=force, read=read)
    base_sha256 = check_base(what, local_folder(what.base))
    tokenizer = load_tokenizer(what.base)
    prompts = [encode(tokenizer, text) for text in PROMPTS]
    adapted = adapt(load_base(what.base, dtype="float32"), what)
    before = logprobs_of(adapted, prompts)
    with disk_errors(output), staged_folder(output, replace=force, check=read) as stage:
        write_adapter(adapted, stage, base=what.base, base_sha256=base_sha256, packed=what.packed)
        after = logprobs_of(attach_adapter(load_base(what.base, dtype="float32"), str(stage)), prompts)
        change = difference(after, before, DEFAULT_BOUNDS["float32"])
        if not change.within:
            raise ExportError(
                f"did not verify: log-probabilities differ by up to {change.max_abs:.3g} when it is read back",
                path="export", fix="report this with the model's architecture",
            )  # fmt: skip
        made = AdapterManifest(
            base=what.base, base_sha256=base_sha256, method=what.method, settings=what.adapter_settings(),
            job_hash=what.job_hash, checkpoint_step=what.step, run_finished=what.finished, lineage=what.lineage,
            versions=manifests.current_versions(), verify=change, files=manifests.describe_files(stage),
        )  # fmt: skip
        manifests.write(made, stage, RECORD)
    return made
