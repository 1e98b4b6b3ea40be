"""Commands that take a job: plan, train, submit, and looks at its data."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer

from rayswift.cli.options import JobFile, Json, Overrides, load_job, print_result

app = typer.Typer()
data_app = typer.Typer(help="Training data.", no_args_is_help=True)
app.add_typer(data_app, name="data")


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
    loaded = load_job(job, overrides)
    if show_config:
        settings = {key: {"value": loaded.value(key), "from": origin} for key, origin in loaded.origins.items()}
        lines = [f"{key} = {entry['value']}  ({entry['from']})" for key, entry in settings.items()]
        print_result(settings, "\n".join(lines), as_json)
        return
    from rayswift.api import plan as make_plan

    made = make_plan(loaded.job)
    print_result(made.to_plain(), made.summary(), as_json)


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

    loaded = load_job(job, overrides, method=method)
    progress = open_progress()
    try:
        from rayswift import api

        report = api.run(loaded.job, progress=progress)
    finally:
        progress.close()
    print_result(report.model_dump(mode="json"), report.summary(), as_json)


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

    load_job(job, overrides)  # a wrong job is told here, before anything is uploaded
    log = sys.stderr if as_json else sys.stdout
    sent = submit_job(job, overrides or (), address=address, working_dir=working_dir, wait=wait, log=log)
    if as_json:
        print(json.dumps({"submission": sent.id, "status": sent.status, "exit_code": sent.exit_code}, indent=1))
    raise typer.Exit(sent.exit_code or 0)


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

    seen = preview(load_job(job, overrides).job, num_rows=rows, embeddings=embeddings)
    print_result(seen.to_plain(), seen.text(colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ), as_json)


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
    print_result(report.to_plain(), report.summary(), as_json)
    report.check()


@app.command()
def schema() -> None:
    """Prints the JSON Schema of a job file, for editors.

    Example: rayswift schema > job.schema.json
    """
    from rayswift.config.load import job_schema

    print(json.dumps(job_schema(), indent=1))
