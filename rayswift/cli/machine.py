"""Commands about this machine: what it can do, and a first look at everything."""

from __future__ import annotations

from typing import Annotated

import typer

from rayswift.cli.options import Force, Json, print_result

app = typer.Typer()


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
    print_result(result.to_plain(), result.summary(), as_json)
    if not result.succeeded:
        raise typer.Exit(1)


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
    print_result(checkup.to_plain(), checkup.summary(), as_json)
    if not checkup.healthy:
        raise typer.Exit(1)
