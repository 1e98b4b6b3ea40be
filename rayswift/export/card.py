"""The model card: README.md of an export, written from its manifest, with the run's loss curve.

Knows Markdown and what the manifest says; measures nothing. What is not known is left out, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayswift.evaluation.report import HarnessReport, scored
from rayswift.export.manifest import MANIFEST, Evaluation, ExportManifest, Lineage
from rayswift.export.measured import Quantization, Speeds
from rayswift.training.run_dir import RunDir
from rayswift.units import format_bytes

CARD, CURVES = "README.md", "curves.png"
_MODEL = {"run": "as trained, in float32", "export": "these files"}
"""What an evaluation was of."""


def write_card(manifest: ExportManifest, name: str, run: RunDir | None, folder: Path) -> None:
    """Write README.md, and the loss curve of the run if it has one, into an export that lacks only its manifest."""
    if run is not None and run.exists(CURVES):
        (folder / CURVES).write_bytes(run.read_bytes(CURVES))
    (folder / CARD).write_text(card_of(manifest, name, has_curves=(folder / CURVES).is_file()), encoding="utf-8")


def card_of(manifest: ExportManifest, name: str, *, has_curves: bool) -> str:
    """The text of README.md; `name` is that of the folder, which has curves.png or not."""
    lines = [*_head(manifest, name), *_origin(manifest)]
    if has_curves:
        lines += ["## Training", "", f"![loss]({CURVES})", ""]
    lines += [*_evaluated(manifest.evaluations), *_quantized(manifest), *_proved(manifest), *_use(name)]
    return "\n".join(lines)


def _head(manifest: ExportManifest, name: str) -> Iterator[str]:
    yield from ("---", "library_name: transformers", "tags: [rayswift]", "---", "", f"# {name}", "")
    yield from (f"{_made_of(manifest)}, exported by RaySwift. {MANIFEST} has this for programs.", "")


def _made_of(manifest: ExportManifest) -> str:
    """Of which model it was trained, and where it is another form of a folder, of which one."""
    how = {None: None, "pretrain": "Pretrained from"}.get(manifest.method, "Fine-tuned from")
    form = "A copy of" if manifest.quantizer == "none" else f"Quantized by {manifest.quantizer} from"
    if (earlier := manifest.earlier) is None:
        return f"{how or form} `{manifest.base}`"
    of = how.lower() if how else "of"
    return f"{form} the export `{earlier.folder}` (version `{earlier.version}`), {of} `{earlier.base}`"


def _origin(manifest: ExportManifest) -> Iterator[str]:
    before = manifest.earlier or manifest
    rows: dict[str, str] = {"base": f"`{before.base}`, sha256 of its weights `{before.base_sha256}`"}
    if earlier := manifest.earlier:
        rows["export"] = (
            f"`{earlier.folder}`, version `{earlier.version}`, sha256 of its weights `{manifest.base_sha256}`"
            + ("" if earlier.quantizer == "none" else f", which {earlier.quantizer} had rounded")
        )
    if manifest.method:
        rows["method"] = manifest.method + (f", with {_adapter(manifest.adapter)}" if manifest.adapter else "")
    packing = manifest.lineage.base_quantization if manifest.lineage else None
    if packing := packing or (manifest.adapter or {}).get("base_quantization"):
        rows["base in training"] = f"packed as {packing}; the adapter is merged into what that stands for"
    if manifest.checkpoint_step is not None:
        rows["step"] = (
            f"{manifest.checkpoint_step}{'' if manifest.run_finished else ', of a run that was not finished'}"
        )
    rows["weights"] = (
        manifest.dtype if manifest.quantizer == "none" else f"{manifest.quantizer}, beside {manifest.dtype}"
    )
    yield from _table("## Where it comes from", rows | _trained_on(manifest.lineage))


def _adapter(adapter: Mapping[str, Any]) -> str:
    rank = f" of rank {adapter['rank']}" if "rank" in adapter else ""
    return f"a {adapter.get('name', 'lora')} adapter{rank}, merged"


def _trained_on(lineage: Lineage | None) -> dict[str, str]:
    if lineage is None:
        return {}
    counts, rows = lineage.ledger, dict[str, str]()
    if "rows_trained" in counts:
        rows["rows"] = f"{counts['rows_trained']} trained on, {counts['rows_quarantined']} quarantined"
        rows["tokens"] = str(counts["tokens"])
    rows["ledger"] = f"sha256 `{lineage.ledger_sha256}`"
    for number, (path, sha256) in enumerate(lineage.data.items(), 1):
        rows[f"data {number}"] = f"`{path}`, sha256 `{sha256}`"
    return rows


def _evaluated(evaluations: Sequence[Evaluation]) -> Iterator[str]:
    """What `rayswift eval` measured, on rows and by tasks."""
    on_rows = [one for one in evaluations if one.rows]
    by_tasks = [(one, one.harness) for one in evaluations if one.harness]
    if on_rows or by_tasks:
        yield from ("## Evaluation", "")
    if on_rows:
        yield "| model | rows | loss | perplexity | exact match | accuracy |"
        yield "|---|---|---|---|---|---|"
        for one in on_rows:
            figures = (
                *map(_number, (one.loss, one.perplexity)),
                _share(one.exact_match, one.num_answered, "answered"),
                _share(one.accuracy, one.num_judged, "judged"),
            )
            files = ", ".join(f"`{_file(file, on_rows)}`" for file in one.rows)
            yield f"| {_MODEL[one.of]} | {files} ({one.num_rows}) | {' | '.join(figures)} |"
        yield ""
    for one, found in by_tasks:
        yield from _tasks(found, _MODEL[one.of])


def _file(path: str, evaluations: Sequence[Evaluation]) -> str:
    """The name of a file, with that of its folder where another file is called the same."""
    place = Path(path)
    named = {sha256 for one in evaluations for file, sha256 in one.rows.items() if Path(file).name == place.name}
    return place.name if len(named) < 2 else "/".join(place.parts[-2:])


def _tasks(found: HarnessReport, model: str) -> Iterator[str]:
    asked = "chats" if found.chat_template else "plain text"
    yield f"lm-evaluation-harness {found.version}, asked as {asked}: {model}"
    yield from ("", "| task | version | shots | samples | result | sha256 |", "|---|---|---|---|---|---|")
    for task in found.tasks:
        shots = "-" if task.num_fewshot is None else str(task.num_fewshot)
        of = "" if task.num_available in (None, task.num_samples) else f" of {task.num_available}"
        results = ", ".join(map(scored, task.scores)) or "-"
        about = f"| `{task.name}` | {task.version or '-'} | {shots} | {task.num_samples}{of} "
        yield f"{about}| {results} | {f'`{task.sha256[:12]}`' if task.sha256 else '-'} |"
    yield ""


def _number(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.4g}"


def _share(fraction: float | None, of: int | None, what: str) -> str:
    """`0.4 (5 judged)`; an older manifest does not say of how many."""
    return _number(fraction) + ("" if fraction is None or of is None else f" ({of} {what})")


def _quantized(manifest: ExportManifest) -> Iterator[str]:
    done: Quantization | None = manifest.quantization
    if done is None:
        return
    settings = ", ".join(f"{name} {value}" for name, value in done.settings.items())
    rows = {
        "quantizer": f"{done.quantizer}{f' ({settings})' if settings else ''}, {done.num_layers} linear layers",
        "left as they are": ", ".join(f"`{pattern}`" for pattern in done.ignore) or "none",
        "weights before": format_bytes(done.bytes_before),
        "through": ", ".join(f"{package} {version}" for package, version in done.versions.items()),
    }
    if done.calibration:
        rows["calibrated on"] = f"{done.calibration.num_rows} rows, {done.calibration.num_tokens} tokens"
    rows |= _held_out(manifest)
    yield from _table("## Quantization", rows)
    if manifest.verify and manifest.verify.speed:
        yield from _speeds(manifest.verify.speed)


def _held_out(manifest: ExportManifest) -> dict[str, str]:
    """What became of rows, where that was compared."""
    found = manifest.verify.held_out if manifest.verify else None
    if found is None:
        return {}
    same = f" (bound {found.bound_top1_agreement:.0%})" if found.bound_top1_agreement else ""
    return {
        f"loss on {found.told}": f"{found.reference_loss:.4f} before, {found.loss:.4f} after",
        "perplexity": f"x{found.perplexity_ratio:.4f} (bound {found.bound_perplexity_ratio:g})",
        "same most likely token": f"{found.top1_agreement:.1%}{same}",
    }


def _speeds(found: Speeds) -> Iterator[str]:
    """Size, load time and speed of the quantized model beside the unquantized one."""
    before, after = found.before, found.after
    rows = (
        ("computed in", before.dtype, after.dtype),
        ("weights", format_bytes(before.size_bytes), format_bytes(after.size_bytes)),
        ("loaded in", f"{before.load_s:.2f} s", f"{after.load_s:.2f} s"),
        ("first token after", f"{1000 * before.first_token_s:.1f} ms", f"{1000 * after.first_token_s:.1f} ms"),
        ("tokens/s", f"{before.tokens_per_second:.1f}", f"{after.tokens_per_second:.1f}, x{found.ratio:.2f}"),
    )
    yield from ("## Size and speed", "", "| | unquantized | quantized |", "|---|---|---|")
    yield from (f"| {name} | {one} | {other} |" for name, one, other in rows)
    yield from (
        "",
        f"Both in engine {found.engine} ({found.version}) on {found.device} of the machine of the export, "
        f"{found.num_answers} answers of {found.num_tokens} tokens at a time.",
        "",
    )


def _proved(manifest: ExportManifest) -> Iterator[str]:
    if (vectors := manifest.vectors) is not None:
        rows = {"read back": f"{vectors.num_texts} texts give the same vectors of {vectors.num_dims} numbers"}
        yield from _table("## Verification", rows)
        return
    if (verify := manifest.verify) is None:
        yield from ("## Verification", "", "Verification was switched off.", "")
        return
    gaps, (same_ids, same_text) = verify.logprobs, _rendering(manifest)
    rows = {
        "read back": f"{verify.num_prompts} prompts, {verify.num_positions} positions"
        + (f", with {' and '.join(verify.media)}" if verify.media else ""),
        "log-probabilities": f"differ by {gaps.mean_abs:.2g} on average, {gaps.max_abs:.2g} at most",
        "tokenizer": same_ids if verify.tokenizer_equal else "differs",
        "chat template": same_text if verify.chat_template_equal else "differs",
    }
    if manifest.quantization is None:
        rows |= _held_out(manifest)
    if served := verify.served:
        rows[f"{served.engine} {served.version}"] = (
            f"differs from transformers by {served.mean_abs:.2g} on average, {served.max_abs:.2g} at most; greedy "
            f"answers agree with the unquantized model's for {served.greedy_agreement:.0%} of their tokens"
        )
        begins = "" if served.first_token_s is None else f", a first token after {1000 * served.first_token_s:.1f} ms"
        rows[f"speed in {served.engine}"] = (
            f"loaded in {served.load_s:.2f} s{begins}, {served.tokens_per_second:.1f} tokens/s of eight answers at a "
            "time, on the machine of the export"
        )
    if verify.not_served:
        rows["serving engine"] = f"none: {verify.not_served}"
    yield from _table("## Verification", rows)


def _rendering(manifest: ExportManifest) -> tuple[str, str]:
    """What is said of a tokenizer and a template that are the base's: those trained with only where that is known."""
    if manifest.lineage and manifest.lineage.rendered_with is not None:
        return "gives the ids that were trained on", "renders what was trained on"
    is_trained = manifest.method is not None or manifest.adapter is not None
    unknown = "; whether they were so in training is not known" if is_trained else ""
    return f"gives the ids that the base's gives{unknown}", f"renders what the base's renders{unknown}"


def _use(name: str) -> Iterator[str]:
    yield from ("## Use", "", "```", f"rayswift serve {name}", "```", "")


def _table(title: str, rows: Mapping[str, str]) -> Iterator[str]:
    yield from (title, "", "| | |", "|---|---|")
    yield from (f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows.items())
    yield ""
