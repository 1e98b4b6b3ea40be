"""The command that talks with a model of an endpoint: a terminal around `serving/chat.py`."""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module
from typing import Annotated

import typer

from rayswift.errors import ConfigError

app = typer.Typer()


@app.command()
def chat(
    url: Annotated[str, typer.Argument(metavar="URL", help="The endpoint: http://HOST:PORT or http://HOST:PORT/v1.")],
    model: Annotated[str | None, typer.Option(help="Which of its models to ask, if it has several.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before everything else.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=2, help="0 is greedy; default: the endpoint's.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; default: the endpoint's.")] = None,
) -> None:
    """Talks with a model behind an OpenAI-compatible endpoint; of a pipe each line is a turn.

    The key is RAYSWIFT_API_KEY. /reset forgets what was said, /exit or Ctrl-D ends, Ctrl-C stops an answer. Answers
    are written to stdout, everything else to stderr.

    Example: rayswift chat http://127.0.0.1:8000 --temperature 0
    """
    from rayswift.serving.chat import ARGUMENT, Settings, converse, open_chat
    from rayswift.serving.client import connected

    with connected(url, argument=ARGUMENT, retries=1) as client:
        converse(open_chat(client, url, model, Settings(system, temperature, max_tokens)), _Terminal())


class _Terminal:
    """Standard input and output. Ctrl-C at the prompt ends like the end of the input."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty()
        if self.interactive:
            with suppress(ImportError):
                import_module("readline")  # lets input() edit the line and recall earlier ones

    def read(self) -> str | None:
        try:
            if self.interactive and sys.stdout.isatty():
                return input("\n> ")
            if self.interactive:  # input() would write the prompt among the answers
                print("\n> ", end="", file=sys.stderr, flush=True)
            return sys.stdin.readline() or None
        except UnicodeDecodeError as error:
            raise ConfigError("is not UTF-8", path="stdin", fix="convert it, for example with iconv") from error
        except (EOFError, KeyboardInterrupt):
            if not self.interactive:
                raise
            print(file=sys.stderr)
            return None

    def say(self, text: str) -> None:
        print(text, end="", flush=True)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
