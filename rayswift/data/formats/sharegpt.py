"""ShareGPT rows: `conversations`, a list of `{from, value}` turns; also `system` and `tools`."""

from __future__ import annotations

from typing import Any

from rayswift.data.conversation import conversation, system_turn, turns
from rayswift.data.types import Sample


class Sharegpt:
    """Roles are human, gpt, system, function_call and observation, and their usual synonyms."""

    def matches(self, columns: frozenset[str]) -> int:
        """10 with `conversations`."""
        return 10 if "conversations" in columns else 0

    def normalise(self, row: dict[str, Any]) -> Sample:
        """The conversation. Raises RowError for missing, empty or misordered turns."""
        messages = turns(row.get("conversations"), "conversations")
        system = [] if messages[0].role == "system" else system_turn(row)
        return conversation(row, [*system, *messages])
