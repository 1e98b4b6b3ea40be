"""Question and answer in two columns, whatever they are called: query/response, question/answer, prompt/response, ...

GSM8K (`question`, `answer`) needs no converter. Where several names are present, the first of each list counts.
"""

from __future__ import annotations

from typing import Any

from rayswift.data.conversation import conversation, pairs, required, system_turn
from rayswift.data.types import Message, Sample

QUERIES = ("query", "question", "prompt", "instruction", "input", "problem")
RESPONSES = ("response", "answer", "output", "solution")


class QueryResponse:
    """One pair per row, after an optional `system` and `history`."""

    def matches(self, columns: frozenset[str]) -> int:
        """8 with a column for the question and one for the answer."""
        return 8 if columns & set(QUERIES) and columns & set(RESPONSES) else 0

    def normalise(self, row: dict[str, Any]) -> Sample:
        """The conversation. Raises RowError when either side is missing, empty or not text."""
        query, response = _first(row, QUERIES), _first(row, RESPONSES)
        pair = [
            Message("user", required(row.get(query), query)),
            Message("assistant", required(row.get(response), response)),
        ]
        return conversation(row, [*system_turn(row), *pairs(row.get("history"), "history"), *pair])


def _first(row: dict[str, Any], names: tuple[str, ...]) -> str:
    return next((name for name in names if name in row), names[0])
