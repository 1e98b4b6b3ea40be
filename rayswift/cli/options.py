"""What commands share: the arguments that several take, how a job is read and how a result is printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rayswift.config.load import LoadedJob

JobFile = Annotated[str, typer.Argument(metavar="JOB", help="The job: a YAML file, or a Python file that defines job.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file: train.lr=2e-5.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


def print_result(plain: Any, text: str, as_json: bool) -> None:
    """What a command found, on stdout: for a program or for a person."""
    print(json.dumps(plain, indent=1, default=str) if as_json else text)


def load_job(job: str, overrides: Sequence[str] | None, method: str | None = None) -> LoadedJob:
    """The job a command was given; of keys in an old spelling a person is told the new one, on stderr."""
    from rayswift.config import load

    loaded = load.load_job(job, overrides or (), method=method)
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    return loaded
