"""The command line: parse, call the library, print. Knows no rule of training, data or serving.

Everything heavy is imported inside the command that needs it, so that `--help` answers at once.
Results go to stdout, progress and messages to stderr. Exit codes are those of `rayswift.errors`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.exceptions import TyperException

import rayswift
from rayswift.errors import ConfigError, RaySwiftError
from rayswift.units import format_bytes

if TYPE_CHECKING:
    from rayswift.config.load import LoadedJob

app = typer.Typer(
    name="rayswift",
    help="One Ray cluster as a fine-tuning service: train, export, serve.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
model_app = typer.Typer(help="Base models.", no_args_is_help=True)
data_app = typer.Typer(help="Training data.", no_args_is_help=True)
app.add_typer(model_app, name="model")
app.add_typer(data_app, name="data")

JobFile = Annotated[str, typer.Argument(metavar="JOB", help="The job: a YAML file, or a Python file that defines job.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file: train.lr=2e-5.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
_TAKE_SETTINGS = ("plan", "train", "submit", "data")  # commands with KEY=VALUE
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Runs a command and exits with its code: the entry point `rayswift`."""
    typed = sys.argv[1:] if args is None else list(args)
    sys.exit(run(lambda: app(args=_with_old_options(typed), prog_name="rayswift", standalone_mode=False)))


def _with_old_options(args: list[str]) -> list[str]:
    """The arguments, with options that other trainers have written as the settings they are here."""
    if not args or args[0] not in _TAKE_SETTINGS or not any(arg.startswith("--") for arg in args):
        return args
    from rayswift.config.spellings import as_overrides

    return as_overrides(args)


def script(command: str, *options: str) -> NoReturn:
    """Runs one command on the arguments of this process: what the files in jobs/ are made of."""
    main([command, *options, *sys.argv[1:]])


def run(command: Callable[[], Any]) -> int:
    """The exit code of a command; what it raises becomes one message on stderr, never a traceback.

    RAYSWIFT_DEBUG=1 shows the traceback.
    """
    try:
        result = command()
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _told("interrupted", 130)
    except TyperException as error:
        return _told(f"error: {error.format_message()}\nSee `rayswift --help`.", 2)
    except RaySwiftError as error:
        return _told(f"error: {error}", error.exit_code)
    except Exception as error:
        text = " ".join(str(error).split()) or "no message"
        return _told(
            f"error: unexpected {type(error).__name__}: {text[:500]}\n"
            "This is a bug of RaySwift or of this machine; run it again with RAYSWIFT_DEBUG=1 for the traceback.", 1
        )  # fmt: skip


def _told(message: str, code: int) -> int:
    if os.environ.get("RAYSWIFT_DEBUG") == "1" and sys.exc_info()[0] is not None:
        traceback.print_exc()
    print(message, file=sys.stderr)
    return code


def _print(plain: Any, text: str, as_json: bool) -> None:
    print(json.dumps(plain, indent=1, default=str) if as_json else text)


def _load(job: str, overrides: Sequence[str] | None, method: str | None = None) -> LoadedJob:
    """The job a command was given; of keys in an old spelling a person is told the new one, on stderr."""
    from rayswift.config.load import load_job

    loaded = load_job(job, overrides or (), method=method)
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    return loaded


def _version(wanted: bool) -> None:
    if wanted:
        print(f"rayswift {rayswift.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """One Ray cluster as a fine-tuning service: train, export, serve."""


@app.command()
def quickstart(
    kind: Annotated[str, typer.Argument(help="What to show: text or vision.")] = "text",
    output: Annotated[str, typer.Option(help="Folder for everything it makes.")] = "quickstart",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Pretrains, fine-tunes, exports, serves and asks a small model on this machine, in a few minutes.

    Example: rayswift quickstart text --output quickstart
    """
    from rayswift.quickstart import run_quickstart

    result = run_quickstart(kind, output, force=force)
    _print(result.to_plain(), result.summary(), as_json)
    if not result.succeeded:
        raise typer.Exit(1)


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
    _print(asdict(report), "\n".join([*lines, *(f"note: {note}" for note in report.notes)]), as_json)


@app.command()
def plan(
    job: JobFile,
    overrides: Overrides = None,
    show_config: Annotated[bool, typer.Option(help="Print every setting and where it was written.")] = False,
    as_json: Json = False,
) -> None:
    """Says what a job would do: layout, placement, memory, speed, and what was rejected. Trains nothing.

    Example: rayswift plan examples/sft.yaml cluster.workers=2
    """
    loaded = _load(job, overrides)
    if show_config:
        settings = {key: {"value": loaded.value(key), "from": origin} for key, origin in loaded.origins.items()}
        lines = [f"{key} = {entry['value']}  ({entry['from']})" for key, entry in settings.items()]
        _print(settings, "\n".join(lines), as_json)
        return
    from rayswift.api import plan as make_plan

    made = make_plan(loaded.job)
    _print(made.to_plain(), made.summary(), as_json)


@app.command()
def train(
    job: JobFile,
    overrides: Overrides = None,
    method: Annotated[str | None, typer.Option(hidden=True, help="Refuse a job of another method.")] = None,
    as_json: Json = False,
) -> None:
    """Trains a job. The same command continues a run that was stopped.

    Example: rayswift train examples/sft.yaml train.lr=2e-5 data.train.0.path=mine.jsonl
    """
    from rayswift.progress import open_progress

    loaded = _load(job, overrides, method=method)
    progress = open_progress()
    try:
        from rayswift import api

        report = api.run(loaded.job, progress=progress)
    finally:
        progress.close()
    _print(report.model_dump(mode="json"), report.summary(), as_json)


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="A run directory, a checkpoint, or a Hugging Face folder.")],
    output: Annotated[str, typer.Argument(help="Folder to write.")],
    dtype: Annotated[str | None, typer.Option(help="Type of the written weights; default: as trained.")] = None,
    quantizer: Annotated[str, typer.Option(help="none, gptq, awq, int8 or fp8.")] = "none",
    bits: Annotated[int | None, typer.Option(help="Bits of a quantized weight: gptq 4 or 8.  [default: 4]")] = None,
    group_size: Annotated[int | None, typer.Option(help="Inputs that share a scale.  [default: 128]")] = None,
    calibration: Annotated[str | None, typer.Option(help="Rows to calibrate on; default: the job's data.")] = None,
    calibration_rows: Annotated[int, typer.Option(min=1, help="How many of them.")] = 256,
    held_out_rows: Annotated[int, typer.Option(min=1, help="Rows that the result is judged by.")] = 64,
    max_length: Annotated[int | None, typer.Option(min=8, help="Longest row in tokens; default: the job's.")] = None,
    max_perplexity: Annotated[
        float | None, typer.Option(help="Most that perplexity may be of the unquantized model's, as a ratio.")
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(help="Least part of positions whose most likely token stays the same.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Writes a trained model as a verified Hugging Face folder: adapter merged, quantized, reloaded, compared.

    Exit code 5, and nothing is left, where the result is further from the trained model than its bounds allow.

    Example: rayswift export runs/sft-demo exports/sft-demo-4bit --quantizer gptq --group-size 64
    """
    from rayswift import api
    from rayswift.export.quantize import asked

    quantize = asked(
        quantizer,
        {"bits": bits, "group_size": group_size},
        {"calibration": calibration, "max_length": max_length, "max_perplexity": max_perplexity,
         "min_agreement": min_agreement},
        num_calibration=calibration_rows,
        num_held_out=held_out_rows,
    )  # fmt: skip
    manifest = api.export(source, output, dtype=dtype, force=force, quantize=quantize)
    text = f"{output}: {len(manifest.files)} files, verified; manifest {os.path.join(output, 'rayswift.json')}"
    if manifest.quantization and manifest.verify and manifest.verify.held_out:
        size = sum(entry.size for name, entry in manifest.files.items() if name.endswith(".safetensors"))
        text += (
            f"\n{quantizer}: {format_bytes(manifest.quantization.bytes_before)} -> {format_bytes(size)}, perplexity "
            f"x{manifest.verify.held_out.perplexity_ratio:.4f} on {manifest.verify.held_out.rows.num_rows} held-out "
            f"rows, the same most likely token at {manifest.verify.held_out.top1_agreement:.1%} of their places"
        )
    if manifest.checkpoint_step is not None:
        state = "finished" if manifest.run_finished else "not finished"
        text += f"\nfrom step {manifest.checkpoint_step}; the run was {state}"
    _print(manifest.model_dump(mode="json"), text, as_json)


@app.command("eval")
def evaluate(
    target: Annotated[str, typer.Argument(help="A run, a checkpoint, a model folder, or an endpoint's URL: .../v1.")],
    rows: Annotated[str, typer.Option(help="Held-out rows: a file, a glob, a folder, a URL, or a dataset of a hub.")],
    format_: Annotated[str, typer.Option("--format", help="Format of the rows; auto finds it.")] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first so many rows.")] = None,
    max_length: Annotated[int | None, typer.Option(min=8, help="Longest row in tokens; default: the run's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Longest answer in tokens; 0 asks nothing.")] = 256,
    model: Annotated[str | None, typer.Option(help="Which of its models an endpoint is to ask.")] = None,
    output: Annotated[str | None, typer.Option(help="Also write the report to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Measures held-out loss, and how often greedy answers are right. Beside a run it leaves eval-ROWS.json.

    The key of an endpoint is RAYSWIFT_API_KEY; an endpoint gives answers and no loss.

    Example: rayswift eval runs/sft-demo --rows data/held_out.jsonl
    """
    from rayswift import api
    from rayswift.progress import open_progress

    with closing(open_progress()) as progress:
        report = api.evaluate(
            target, rows, format=format_, limit=limit, max_length=max_length, max_new_tokens=max_new_tokens,
            model=model, output=output, progress=progress,
        )  # fmt: skip
    _print(report.model_dump(mode="json"), report.summary(), as_json)


@app.command()
def serve(
    models: Annotated[list[str], typer.Argument(metavar="[NAME=]FOLDER...", help="Exports, or one YAML serve spec.")],
    host: Annotated[str | None, typer.Option(help="Address to listen on.  [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.  [default: 8000]")] = None,
    api_key_file: Annotated[str | None, typer.Option(help="File with the keys clients may send.")] = None,
    engine: Annotated[str | None, typer.Option(help="Serving engine.  [default: local]")] = None,
    as_json: Json = False,
) -> None:
    """Serves exports behind an OpenAI-compatible endpoint until Ctrl-C.

    Keys are read from --api-key-file or RAYSWIFT_API_KEY. Without one only this machine can ask. --json prints
    url, models and pid once it answers.

    Example: rayswift serve exports/sft-demo --port 8000
    """
    from rayswift.serving.app import run as serve_until_stopped
    from rayswift.serving.spec import parse

    given = {"host": host, "port": port, "api_key_file": api_key_file, "engine": engine}
    spec = parse({**_served(models), **{k: v for k, v in given.items() if v is not None}})
    ready = {"url": spec.url, "models": list(spec.models), "pid": os.getpid()}
    tell = (lambda _: print(json.dumps(ready, indent=1), flush=True)) if as_json else None
    serve_until_stopped(spec, on_ready=tell)


def _served(models: list[str]) -> dict[str, Any]:
    """What is to be served: the settings of a spec file, or folders under their own or a given name."""
    from rayswift.serving.spec import load, name_of

    if len(models) == 1 and "=" not in models[0]:
        return load(models[0]).model_dump(mode="json", exclude_unset=True)
    named: dict[str, str] = {}
    for model in models:
        name, folder = model.split("=", 1) if "=" in model else (name_of(model), model)
        if not name or not folder:
            raise ConfigError("is not NAME=FOLDER", path="models", value=model, fix="write chat=exports/sft-demo")
        if name in named:
            raise ConfigError(f"is named twice: {named[name]} and {folder}", path="models", value=name,
                              fix="give one of them another name: other=FOLDER")  # fmt: skip
        named[name] = folder
    return {"models": named}


keys_app = typer.Typer(help="API keys of an endpoint, in a file that holds none.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
KeyFile = Annotated[str, typer.Argument(metavar="FILE", help="The file; of each key it has the sha256.")]


@keys_app.command("add")
def keys_add(
    file: KeyFile,
    name: Annotated[str, typer.Option(help="What the key is called; each name once.")],
    requests_per_minute: Annotated[int | None, typer.Option(help="Most requests in any 60 s, per replica.")] = None,
    max_concurrency: Annotated[int | None, typer.Option(help="Most requests at a time, per replica.")] = None,
    models: Annotated[str | None, typer.Option(metavar="A,B", help="The only models it may ask.")] = None,
) -> None:
    """Makes a key, prints it this once, and writes its sha256 and limits into FILE. Counts when `serve` starts again.

    Example: rayswift keys add keys.yaml --name alice --requests-per-minute 60 --models sft-demo
    """
    from rayswift.serving import keys

    listed = None if models is None else [model.strip() for model in models.split(",")]
    print(keys.add(file, name, requests_per_minute=requests_per_minute, max_concurrency=max_concurrency, models=listed))
    print(f"note: this is the only time the key of {name} is shown", file=sys.stderr)


@keys_app.command("list")
def keys_list(file: KeyFile, as_json: Json = False) -> None:
    """Shows the keys of FILE by name: when they were made, and their limits.

    Example: rayswift keys list keys.yaml
    """
    from rayswift.serving import keys

    known = keys.read(file)
    plain = [key.model_dump(mode="json", exclude={"sha256"}) for key in known]
    _print(plain, "\n".join(map(keys.line, known)) or f"{file} holds no key", as_json)


@keys_app.command("revoke")
def keys_revoke(file: KeyFile, name: Annotated[str, typer.Argument(metavar="NAME", help="The key's name.")]) -> None:
    """Takes a key out of FILE. An endpoint that runs refuses it once it is started again.

    Example: rayswift keys revoke keys.yaml alice
    """
    from rayswift.serving import keys

    keys.revoke(file, name)
    print(f"{file}: {name} is revoked from the next start of the endpoint on", file=sys.stderr)


@app.command()
def submit(
    job: JobFile,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="The cluster's dashboard URL; default: RAY_ADDRESS.")] = None,
    working_dir: Annotated[str, typer.Option(help="Folder that is sent along; .gitignore is respected.")] = ".",
    wait: Annotated[bool, typer.Option(help="Follow the log and exit with the job's code.")] = True,
    as_json: Json = False,
) -> None:
    """Runs `rayswift train` on a Ray cluster, with this folder as its working directory.

    With --json the job's log goes to stderr.

    Example: rayswift submit examples/sft.yaml --address URL train.max_steps=10
    """
    from rayswift.cluster.submit import submit as submit_job

    _load(job, overrides)  # a wrong job is told here, before anything is uploaded
    log = sys.stderr if as_json else sys.stdout
    sent = submit_job(job, overrides or (), address=address, working_dir=working_dir, wait=wait, log=log)
    if as_json:
        print(json.dumps({"submission": sent.id, "status": sent.status, "exit_code": sent.exit_code}, indent=1))
    raise typer.Exit(sent.exit_code or 0)


@app.command()
def doctor(
    ray: Annotated[bool, typer.Option(help="Also start a small Ray cluster and stop it again.")] = True,
    as_json: Json = False,
) -> None:
    """Says what this machine can do, and how to mend what is missing. Exit code 1 when training cannot work.

    Example: rayswift doctor --json
    """
    from rayswift.doctor import examine

    checkup = examine(start_ray=ray)
    _print(checkup.to_plain(), checkup.summary(), as_json)
    if not checkup.healthy:
        raise typer.Exit(1)


@data_app.command("inspect")
def data_inspect(
    job: JobFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to show of each source.")] = 2,
    embeddings: Annotated[
        bool | None,
        typer.Option(help="Load the model to compare embeddings of text and media.  [default: up to 4 GiB of weights]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Shows rows as the model sees them: what is trained on in green, token counts, how full sequences get.

    Of rows with media also their grids and placeholders, and how embeddings of media and of text compare.

    Example: rayswift data inspect examples/sft.yaml --rows 3
    """
    from rayswift.preview import preview

    seen = preview(_load(job, overrides).job, num_rows=rows, embeddings=embeddings)
    _print(seen.to_plain(), seen.text(colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ), as_json)


@data_app.command("audit")
def data_audit(
    run_dir: Annotated[str, typer.Argument(metavar="RUN", help="A run directory: output/name.")],
    as_json: Json = False,
) -> None:
    """Proves from the run directory that each row was trained on or quarantined as often as planned; else exit 4.

    Example: rayswift data audit runs/sft-demo
    """
    from rayswift import api

    report = api.audit(run_dir)
    _print(report.to_plain(), report.summary(), as_json)
    report.check()


@app.command()
def schema() -> None:
    """Prints the JSON Schema of a job file, for editors.

    Example: rayswift schema > job.schema.json
    """
    from rayswift.config.load import job_schema

    print(json.dumps(job_schema(), indent=1))


if __name__ == "__main__":
    main()
