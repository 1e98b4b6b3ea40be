"""The verification prompts of a promotion: of a row file, of what the export's job held out, or a few plain ones.

Knows where they come from. How answers are compared is known by `serving/promotion.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayswift.errors import ConfigError, RaySwiftError
from rayswift.evaluation.rows import conversations, open_rows
from rayswift.export.manifest import read

_PLAIN = (
    "Hello",
    "What can you do?",
    "Write one sentence about the sea.",
    "What is 7 times 6? Answer with the number.",
)


@dataclass(frozen=True)
class Question:
    """A conversation of text, and the answer that is right, where one is known."""

    turns: list[dict[str, Any]]
    expected: str | None
    max_new_tokens: int


def of_rows(path: str, limit: int, max_new_tokens: int) -> list[Question]:
    """The first `limit` questions of a row file, those without media. Raises ConfigError where there is none."""
    found = [
        Question(one.chat, one.expected, max_new_tokens)
        for one in conversations(open_rows(path)).questions
        if not one.num_media and not one.tools
    ][:limit]
    if not found:
        raise ConfigError("has no conversation of text with an answer", path="--prompts", value=path,
                          fix="give rows like those of `rayswift eval --rows`")  # fmt: skip
    return found


def of_export(folder: str, limit: int, max_new_tokens: int) -> tuple[list[Question], str]:
    """Questions for an export, and where they are from: the rows that its job held out, if they lie here."""
    lineage = read(folder).lineage
    for source in (lineage.job.get("data", {}).get("eval") or ()) if lineage else ():
        path = str(source.get("path"))
        try:
            return of_rows(path, limit, max_new_tokens), path
        except (RaySwiftError, OSError):
            continue  # they lie elsewhere, or are no conversations
    return [Question([{"role": "user", "content": text}], None, max_new_tokens) for text in _PLAIN], "plain prompts"
