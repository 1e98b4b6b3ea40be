"""OpenAI rows: `messages`, a list of `{role, content}`; also `tools`.

A message may have `tool_calls`, `reasoning_content`, `loss`, and `loss_scale` (ms-swift) or `weight` (OpenAI).
"""

from __future__ import annotations

from typing import Any

from rayswift.data.conversation import conversation, system_turn, turns
from rayswift.data.types import Sample


class Messages:
    """`loss: false` on an assistant message leaves it out of the loss, `loss: true` takes any message in; `loss_scale`
    or `weight` is what each token of a message that is in counts."""

    def matches(self, columns: frozenset[str]) -> int:
        """10 with `messages`."""
        return 10 if "messages" in columns else 0

    def normalise(self, row: dict[str, Any]) -> Sample:
        """The conversation. Raises RowError for missing, empty or misordered messages."""
        messages = turns(row.get("messages"), "messages")
        system = [] if messages[0].role == "system" else system_turn(row)
        return conversation(row, [*system, *messages])
