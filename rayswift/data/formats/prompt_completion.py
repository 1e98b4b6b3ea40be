"""Rows with `prompt` and `completion`, each a text or a list of messages (TRL writes both)."""

from __future__ import annotations

from typing import Any

from rayswift.data.conversation import conversation, required, system_turn, turns
from rayswift.data.types import Message, Sample


class PromptCompletion:
    """Rendered with the chat template like any pair: what is trained is what the chat endpoint is asked."""

    def matches(self, columns: frozenset[str]) -> int:
        """10 with both columns."""
        return 10 if {"prompt", "completion"} <= columns else 0

    def normalise(self, row: dict[str, Any]) -> Sample:
        """The conversation. Raises RowError when either side is missing, empty or misordered."""
        messages = [*_side(row, "prompt", "user"), *_side(row, "completion", "assistant")]
        system = [] if messages[0].role == "system" else system_turn(row)
        return conversation(row, [*system, *messages])


def _side(row: dict[str, Any], name: str, role: str) -> list[Message]:
    value = row.get(name)
    return turns(value, name) if isinstance(value, list) else [Message(role, required(value, name))]
