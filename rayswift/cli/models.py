"""Commands about models: made, exported and measured."""

from __future__ import annotations

import os
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from rayswift.cli.options import Force, Json, print_result
from rayswift.errors import ConfigError
from rayswift.units import format_bytes

if TYPE_CHECKING:
    from rayswift.export.manifest import ExportManifest

app = typer.Typer()
model_app = typer.Typer(help="Base models.", no_args_is_help=True)
app.add_typer(model_app, name="model")
_OF_AN_ADAPTER = frozenset({"source", "output", "output_option", "adapter_only", "force", "as_json"})
"""The options of `export` that go with --adapter-only."""


@model_app.command("init")
def model_init(
    directory: Annotated[str, typer.Argument(help="Folder to make.")],
    files: Annotated[
        list[str] | None, typer.Argument(metavar="[FILE]...", help="More files for --train-tokenizer.")
    ] = None,
    arch: Annotated[str | None, typer.Option(help="Architecture of transformers, such as qwen3 or llama.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Number of blocks.")] = None,
    hidden_size: Annotated[int | None, typer.Option(min=1, help="Width of the residual stream.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Number of attention heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Number of key/value heads.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(min=1, help="Width of the MLP.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Number of tokens.")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Longest sequence in tokens.")] = None,
    train_tokenizer: Annotated[
        list[str] | None, typer.Option(help="Text file for a BPE tokenizer; repeatable.")
    ] = None,
    like: Annotated[str | None, typer.Option(help="Take the shape of this folder or hub id.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    as_json: Json = False,
) -> None:
    """Makes a base model with random weights: an ordinary Hugging Face folder.

    Example: rayswift model init models/tiny --arch qwen3 --layers 4 --hidden-size 128 --heads 4 --kv-heads 2
    --vocab-size 4096 --train-tokenizer corpus.txt --seed 0
    """
    from dataclasses import asdict

    if files and not train_tokenizer:
        raise ConfigError("is not expected", path="argument", value=files[0], fix="write --train-tokenizer before it")
    from rayswift.models.init import init_model

    report = init_model(
        directory, arch=arch, layers=layers, hidden_size=hidden_size, heads=heads, kv_heads=kv_heads,
        intermediate_size=intermediate_size, vocab_size=vocab_size, max_length=max_length,
        train_tokenizer_files=[*(train_tokenizer or ()), *(files or ())], like=like, seed=seed,
    )  # fmt: skip
    lines = [f"{report.directory}: {report.arch}, {report.num_params:,} parameters, {report.vocab_size} tokens"]
    print_result(asdict(report), "\n".join([*lines, *(f"note: {note}" for note in report.notes)]), as_json)


@app.command()
def export(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="A run directory, a checkpoint, or a Hugging Face folder.")],
    output: Annotated[str | None, typer.Argument(help="Folder to write; also as --output.")] = None,
    output_option: Annotated[str | None, typer.Option("--output", "-o", help="The same as OUTPUT.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Type of the written weights; default: as trained.")] = None,
    quantizer: Annotated[str, typer.Option(help="none, gptq, awq, int8 or fp8.")] = "none",
    bits: Annotated[int | None, typer.Option(help="Bits of a quantized weight: gptq 4 or 8.  [default: 4]")] = None,
    group_size: Annotated[int | None, typer.Option(help="Inputs that share a scale.  [default: 128]")] = None,
    calibration: Annotated[str | None, typer.Option(help="Rows to calibrate on; default: the job's data.")] = None,
    calibration_rows: Annotated[int, typer.Option(min=1, help="How many of them.")] = 256,
    held_out_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows that the result is judged by.  [default: 64, not quantized 16]")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=8, help="Longest row in tokens; default: the job's.")] = None,
    max_perplexity: Annotated[
        float | None, typer.Option(help="Most that perplexity on them may be of the trained model's, as a ratio.")
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(help="Least part of positions whose most likely token stays the same.")
    ] = None,
    max_difference: Annotated[
        float | None, typer.Option(min=0, help="Most that log-probabilities may be off the trained model's on average.")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(help="Serving engine that is to answer from it too: auto (as an endpoint), vllm, local, none."),
    ] = "auto",
    max_engine_difference: Annotated[
        float | None, typer.Option(min=0, help="Most that its log-probabilities may be off on average.")
    ] = None,
    adapter_only: Annotated[
        bool, typer.Option(help="Write the LoRA adapter alone, for serving beside its base.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Writes a trained model as a verified Hugging Face folder: adapter merged, quantized, reloaded, compared.

    Exit code 5, and nothing is left, where the result is further from the trained model than its bounds allow.

    Example: rayswift export runs/sft-demo exports/sft-demo-4bit --quantizer gptq --group-size 64
    """
    from rayswift import api
    from rayswift.export.quantize import asked
    from rayswift.export.terms import NUM_HELD_OUT_QUANTIZED

    output = _one_of(output, output_option)
    if adapter_only:
        _refuse_beside_adapter_only(context)
        alone = api.export_adapter(source, output, force=force)
        print_result(
            alone.model_dump(mode="json"),
            f"{output}: the adapter of step {alone.checkpoint_step}, verified; it belongs to {alone.base}",
            as_json,
        )
        return
    quantize = asked(
        quantizer,
        {"bits": bits, "group_size": group_size},
        {"calibration": calibration, "max_length": max_length, "min_agreement": min_agreement},
        num_calibration=calibration_rows,
        num_held_out=held_out_rows or NUM_HELD_OUT_QUANTIZED,
    )
    manifest = api.export(source, output, dtype=dtype, force=force, quantize=quantize, engine=engine,
                          max_difference=max_difference, engine_bound=max_engine_difference,
                          max_perplexity=max_perplexity, num_held_out=held_out_rows)  # fmt: skip
    print_result(manifest.model_dump(mode="json"), _told(manifest, output), as_json)


def _refuse_beside_adapter_only(context: typer.Context) -> None:
    """Raises ConfigError for options that say something else than their default of how a model is written or proved."""
    given = [
        option.opts[0]
        for option in context.command.params
        if option.name not in _OF_AN_ADAPTER and context.params[str(option.name)] != option.default
    ]
    if given:
        raise ConfigError(f"does not go with {', '.join(given)}: an adapter is written as it was trained",
                          path="--adapter-only", fix="leave them out")  # fmt: skip


def _told(manifest: ExportManifest, output: str) -> str:
    """What was written and proved, for a person."""
    text = f"{output}: {len(manifest.files)} files, verified; manifest {os.path.join(output, 'rayswift.json')}"
    held_out = manifest.verify and manifest.verify.held_out
    if manifest.quantization is None and held_out:
        text += f"\n{manifest.dtype}: perplexity x{held_out.perplexity_ratio:.4f} on {held_out.told}"
    if manifest.quantization and manifest.verify and manifest.verify.held_out:
        size = sum(entry.size for name, entry in manifest.files.items() if name.endswith(".safetensors"))
        before = format_bytes(manifest.quantization.bytes_before)
        text += (
            f"\n{manifest.quantizer}: {before} -> {format_bytes(size)}, perplexity "
            f"x{manifest.verify.held_out.perplexity_ratio:.4f} on {manifest.verify.held_out.told}, "
            f"the same most likely token at {manifest.verify.held_out.top1_agreement:.1%} of their places"
        )
    if manifest.verify and (served := manifest.verify.served):
        text += (
            f"\n{served.engine} {served.version} answers from it: log-probabilities differ by {served.mean_abs:.2g} on "
            f"average from transformers', {served.greedy_agreement:.0%} of greedy tokens are the unquantized model's, "
            f"loaded in {served.load_s:.1f} s, {served.tokens_per_second:.0f} tokens/s at concurrency 8"
        )
    if manifest.verify and (both := manifest.verify.speed):
        text += (
            f"\nspeed in {both.engine}: {both.before.tokens_per_second:.0f} -> {both.after.tokens_per_second:.0f} "
            f"tokens/s (x{both.ratio:.2f}), first token after {1000 * both.before.first_token_s:.0f} -> "
            f"{1000 * both.after.first_token_s:.0f} ms, loaded in {both.before.load_s:.1f} -> {both.after.load_s:.1f} s"
        )
    if manifest.checkpoint_step is not None:
        state = "finished" if manifest.run_finished else "not finished"
        text += f"\nfrom step {manifest.checkpoint_step}; the run was {state}"
    return text


def _one_of(output: str | None, option: str | None) -> str:
    """OUTPUT, which may be given in two ways. Raises ConfigError unless it is given in one."""
    found = [one for one in (output, option) if one is not None]
    if len(found) == 1:
        return found[0]
    rule = "is missing" if not found else f"is given twice: {found[0]} and {found[1]}"
    raise ConfigError(rule, path="OUTPUT", fix="name the folder to write once: rayswift export SOURCE OUTPUT")


@app.command()
def push(
    folder: Annotated[str, typer.Argument(help="An export.")],
    repo: Annotated[str, typer.Argument(help="ORG/NAME on the hub; made if it is not there.")],
    public: Annotated[bool, typer.Option(help="Make a new repository public.")] = False,
    branch: Annotated[str, typer.Option(help="Branch to commit to.")] = "main",
    force: Annotated[bool, typer.Option("--force", help="Replace files there that are no export.")] = False,
    as_json: Json = False,
) -> None:
    """Publishes a verified export on a model hub, in one commit. The hub's token is HF_TOKEN or `hf auth login`'s.

    An export that lies there is replaced; a repository with other files is refused without --force.

    Example: rayswift push exports/sft-demo my-team/sft-demo
    """
    from dataclasses import asdict

    from rayswift.export.push import push as publish

    done = publish(folder, repo, public=public, branch=branch, force=force)
    print_result(asdict(done), f"{done.url}: version {done.version}", as_json)


@app.command("eval")
def evaluate(
    target: Annotated[str, typer.Argument(help="A run, a checkpoint, a model folder, or an endpoint's URL: .../v1.")],
    rows: Annotated[
        str | None, typer.Option(help="Held-out rows: a file, a glob, a folder, a URL, or a dataset of a hub.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of the lm-evaluation-harness, with commas between them.")
    ] = None,
    format_: Annotated[str, typer.Option("--format", help="Format of the rows; auto finds it.")] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first so many rows, and of each task.")] = None,
    max_length: Annotated[int | None, typer.Option(min=8, help="Longest row in tokens; default: the run's.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=0, help="Longest answer to a row in tokens; 0 asks nothing. Tasks have their own.")
    ] = 256,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in a task's prompt; default: its own.")
    ] = None,
    include_path: Annotated[str | None, typer.Option(help="Folder with YAML files of your own tasks.")] = None,
    chat_template: Annotated[
        bool | None, typer.Option("--chat-template/--no-chat-template", help="Ask tasks as chats; default: as served.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts of tasks at a time, on a model of this machine.")] = 8,
    model: Annotated[str | None, typer.Option(help="Which of its models an endpoint is to ask.")] = None,
    output: Annotated[str | None, typer.Option(help="Also write the report to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Measures held-out loss, how often greedy answers are right, and tasks of the lm-evaluation-harness.

    At least one of --rows and --tasks is needed. Of a run, its export or its adapter, rows are read, and their tokens
    count, as its job says; with --format, columns and turns of other files than the job's are taken as they are.
    Beside a run it leaves eval-ROWS.json, or eval-tasks-TASKS.json; in an export the same, which is named in its
    manifest and on its card and leaves its version what it was. Other rows of the same name leave eval-ROWS-HASH.json.
    The key of an endpoint is RAYSWIFT_API_KEY; an endpoint gives answers and no loss, and takes tasks that generate.

    Example: rayswift eval runs/sft-demo --rows data/held_out.jsonl --tasks gsm8k,arc_easy
    """
    from rayswift import api
    from rayswift.progress import open_progress

    with closing(open_progress()) as progress:
        report = api.evaluate(
            target, rows, format=format_, limit=limit, max_length=max_length, max_new_tokens=max_new_tokens,
            model=model, output=output, progress=progress, tasks=tuple((tasks or "").replace(",", " ").split()),
            num_fewshot=num_fewshot, include_path=include_path, chat_template=chat_template, batch_size=batch_size,
        )  # fmt: skip
    print_result(report.model_dump(mode="json"), report.summary(), as_json)
