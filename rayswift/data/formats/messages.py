"""OpenAI rows: `messages`, a list of `{role, content}`; also `tools`, `tool_calls` and a `loss` per message."""

from __future__ import annotations

from typing import Any

from rayswift.data.conversation import conversation, system_turn, turns
from rayswift.data.types import Sample


class Messages:
    """`loss: false` on an assistant message leaves it out of the loss, `loss: true` takes any message in."""

    def matches(self, columns: frozenset[str]) -> int:
        """10 with `messages`."""
        return 10 if "messages" in columns else 0

    def normalise(self, row: dict[str, Any]) -> Sample:
        """The conversation. Raises RowError for missing, empty or misordered messages."""
        messages = turns(row.get("messages"), "messages")
        system = [] if messages[0].role == "system" else system_turn(row)
        return conversation(row, [*system, *messages])
