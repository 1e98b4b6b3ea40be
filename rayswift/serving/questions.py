"""The verification prompts of a promotion: of a row file, of what the export's job held out, or a few plain ones.

Knows where they come from, and as what a model is asked. How answers are compared is known by `serving/promotion.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

from rayswift.errors import ConfigError, RaySwiftError
from rayswift.evaluation.rows import Rows, conversations, open_rows
from rayswift.export.manifest import read
from rayswift.models.loading import load_tokenizer
from rayswift.models.pooling import read_pooling

Kind = Literal["chat", "text", "vectors"]
"""What a model is asked: to answer a conversation, to continue a text, or for the vector of a text."""
_Asked = tuple[list[dict[str, Any]] | str, str | None]
_PLAIN = (
    "Hello",
    "What can you do?",
    "Write one sentence about the sea.",
    "What is 7 times 6? Answer with the number.",
)
_MAX_CHARS = 1000
"""Of a text: enough to tell two models by. What those have room for is cut off by `Question.within`."""


@dataclass(frozen=True)
class Question:
    """A conversation of text or a text, and the answer that is right, where one is known."""

    asked: list[dict[str, Any]] | str
    expected: str | None
    max_new_tokens: int

    @property
    def text(self) -> str:
        """What is said in it last."""
        return self.asked if isinstance(self.asked, str) else str(self.asked[-1]["content"])

    def within(self, max_tokens: int) -> Question:
        """A text as far as it has so many tokens for certain: none has less than a byte. Conversations stay whole."""
        if not isinstance(self.asked, str):
            return self
        return replace(self, asked=self.asked.encode()[:max_tokens].decode(errors="ignore"))


def kind_of(export: str, live: str) -> Kind:
    """What an export and the live version's can both be asked: conversations if both have a chat template.

    Raises ConfigError.
    """
    folders = {"EXPORT": export, "live": live}
    if any(read_pooling(folder, field=field) is not None for field, folder in folders.items()):
        return "vectors"
    has_template = [load_tokenizer(folder, field=field).chat_template for field, folder in folders.items()]
    return "chat" if all(has_template) else "text"


def of_rows(path: str, limit: int, max_new_tokens: int, kind: Kind) -> list[Question]:
    """The first `limit` questions of a row file, those without media. Raises ConfigError where there is none."""
    rows = open_rows(path)
    asked: Iterator[_Asked] = _chats(rows) if kind == "chat" else _texts(rows, kind)
    found = [Question(one, expected, max_new_tokens) for one, expected in islice(asked, limit)]
    if not found:
        lacks = "conversation of text with an answer" if kind == "chat" else "text"
        raise ConfigError(f"has no {lacks}", path="--prompts", value=path,
                          fix="give rows like those of `rayswift eval --rows`")  # fmt: skip
    return found


def of_export(folder: str, limit: int, max_new_tokens: int, kind: Kind) -> tuple[list[Question], str]:
    """Questions for an export, and where they are from: the rows that its job held out, if they lie here."""
    lineage = read(folder).lineage
    for source in (lineage.job.get("data", {}).get("eval") or ()) if lineage else ():
        path = str(source.get("path"))
        try:
            return of_rows(path, limit, max_new_tokens, kind), path
        except (RaySwiftError, OSError):
            continue  # they lie elsewhere, or there is nothing in them to ask
    plain = [Question(text if kind != "chat" else [{"role": "user", "content": text}], None, max_new_tokens)
             for text in _PLAIN]  # fmt: skip
    return plain, "plain prompts"


def _chats(rows: Rows) -> Iterator[tuple[list[dict[str, Any]], str]]:
    for one in conversations(rows).questions:
        if not one.num_media and not one.tools:
            yield one.chat, one.expected


def _texts(rows: Rows, kind: Kind) -> Iterator[tuple[str, None]]:
    """The first half of each text, which is to be continued, and for vectors all of it; of conversations the question.

    Nothing is expected: no continuation is the only right one.
    """
    for _, _, sample in rows.samples():
        if sample is None or sample.media:
            continue
        text = sample.text
        if text is None:
            text = next((str(message.content) for message in sample.messages if message.role == "user"), "")
        elif kind == "text":
            text = text[: len(text) // 2]
        if text.strip():
            yield text[:_MAX_CHARS], None
