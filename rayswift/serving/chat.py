"""A conversation with a model of an endpoint: its turns, and what is done about an answer that is stopped or fails.

Knows the official client. Knows no terminal: what reads lines and shows text is handed in.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from rayswift.errors import ConfigError, ServeError
from rayswift.serving.client import models_of, only, printable, told

if TYPE_CHECKING:
    import openai

ARGUMENT = "URL"
HINT = "/reset forgets what was said, /exit or Ctrl-D ends, Ctrl-C stops an answer"


@dataclass(frozen=True)
class Settings:
    """How it is asked; None leaves the choice to the endpoint."""

    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None


class Terminal(Protocol):
    """Whom the model talks with. `interactive` says whether a person types, who can go on after an error."""

    @property
    def interactive(self) -> bool: ...

    def read(self) -> str | None:
        """The next line, None when there is no more."""

    def say(self, text: str) -> None:
        """Show a piece of an answer."""

    def note(self, text: str) -> None:
        """Show a line that is no part of an answer."""


class Chat:
    """The turns so far. Invariant: each question among `turns` is followed by an answer, if only the begin of one."""

    def __init__(self, client: openai.OpenAI, url: str, model: str, settings: Settings, version: str | None) -> None:
        self._client, self._url, self._settings = client, url, settings
        self.model, self.version = model, version
        self.turns: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self.turns = []

    def answer(self, question: str) -> Generator[str]:
        """The pieces of the answer as they come. Closed early it keeps what was said so far.

        Sets `version` to what the endpoint says has answered. Raises ConfigError or ServeError.
        """
        said, asked = "", [*self.turns, {"role": "user", "content": question}]
        try:
            with told(self._url, ARGUMENT), self._client.chat.completions.create(**self._request(asked)) as stream:
                for chunk in stream:
                    self.version = chunk.system_fingerprint or self.version
                    if chunk.choices and (piece := chunk.choices[0].delta.content):
                        said += piece
                        yield piece
        finally:
            if said:
                self.turns = [*asked, {"role": "assistant", "content": said}]

    def _request(self, turns: list[dict[str, str]]) -> dict[str, Any]:
        system = [{"role": "system", "content": self._settings.system}] if self._settings.system else []
        given = {"temperature": self._settings.temperature, "max_tokens": self._settings.max_tokens}
        options = {name: value for name, value in given.items() if value is not None}
        return {"model": self.model, "messages": [*system, *turns], "stream": True, **options}


def open_chat(client: openai.OpenAI, url: str, model: str | None, settings: Settings) -> Chat:
    """A chat with the model asked for, else with the only one. Raises ConfigError for one that is not served."""
    import openai

    served = models_of(client)
    talking = [name for name, card in served.items() if (card.model_extra or {}).get("task") != "embed"]
    name = only(talking, url) if model is None else model
    if (card := served.get(name)) is None:
        try:  # not every model has to be listed
            card = client.models.retrieve(name)
        except openai.APIStatusError as error:
            names = printable(", ".join(list(served)[:10]))
            raise ConfigError(f"is no model of {url}", path="--model", value=name,
                              fix=f"use {names}" if names else "serve one") from error  # fmt: skip
    known = (card.model_extra or {}).get("rayswift")
    return Chat(client, url, name, settings, known.get("version") if isinstance(known, dict) else None)


def converse(chat: Chat, terminal: Terminal) -> None:
    """Asks line by line until there is none, or `/exit`.

    A person is told of an answer that was refused and goes on; without one the first error is raised.
    """
    terminal.note(f"{chat.model}{_of(chat.version)}")
    if terminal.interactive:
        terminal.note(HINT)
    while (line := terminal.read()) is not None:
        question = line.strip()
        if question == "/exit":
            return
        if question == "/reset":
            chat.reset()
            terminal.note("forgotten")
        elif question:
            _turn(chat, question, terminal)


def _turn(chat: Chat, question: str, terminal: Terminal) -> None:
    before = chat.version
    try:
        with closing(chat.answer(question)) as pieces:
            for piece in pieces:
                terminal.say(printable(piece))
        terminal.say("\n")
    except (KeyboardInterrupt, ServeError) as stopped:
        terminal.say("\n")
        if not terminal.interactive:
            raise
        terminal.note("stopped" if isinstance(stopped, KeyboardInterrupt) else str(stopped))
    if chat.version != before:
        terminal.note(f"{chat.model}{_of(chat.version)}")


def _of(version: str | None) -> str:
    return f", version {printable(version)}" if version else ""
