"""Alpaca rows: `instruction`, optional `input`, `output`; also `system` and `history` as LLaMA-Factory writes them."""

from __future__ import annotations

from typing import Any

from rayswift.data.conversation import conversation, pairs, required, system_turn, text
from rayswift.data.formats import RowError
from rayswift.data.types import Message, Sample


class Alpaca:
    """The question is `instruction`, a newline and `input` (and `context`, as Dolly calls it); the answer `output`."""

    def matches(self, columns: frozenset[str]) -> int:
        """10 with both `instruction` and `output`."""
        return 10 if {"instruction", "output"} <= columns else 0

    def normalise(self, row: dict[str, Any]) -> Sample:
        """A conversation of the history and one more pair. Raises RowError without a question or an answer."""
        parts = [text(row.get(name), name) for name in ("instruction", "input", "context")]
        question = "\n".join(part for part in parts if part.strip())
        if not question:
            raise RowError("`instruction` is empty")
        answer = required(row.get("output"), "output")
        history = pairs(row.get("history"), "history")
        return conversation(row, [*system_turn(row), *history, Message("user", question), Message("assistant", answer)])
