"""The command line: parse, call the library, print. Knows no rule of training, data or serving.

Everything heavy is imported inside the command that needs it, so that `--help` answers at once.
Results go to stdout, progress and messages to stderr. Exit codes are those of `rayswift.errors`.
A file beside this one holds the commands of one subject.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.exceptions import TyperException

import rayswift
from rayswift.cli import chat, endpoint, jobs, machine, models
from rayswift.errors import RaySwiftError

app = typer.Typer(
    name="rayswift",
    help="One Ray cluster as a fine-tuning service: train, export, serve.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for subject in (machine, jobs, models, endpoint, chat):
    app.add_typer(subject.app)
_INTERRUPTED = 130
_TAKE_SETTINGS = ("plan", "train", "submit", "data")  # commands with KEY=VALUE


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
        if result == _INTERRUPTED:  # typer makes that of a KeyboardInterrupt, and says nothing
            return _told("interrupted", _INTERRUPTED)
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _told("interrupted", _INTERRUPTED)
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


def _version(wanted: bool) -> None:
    if wanted:
        print(f"rayswift {rayswift.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """One Ray cluster as a fine-tuning service: train, export, serve."""
