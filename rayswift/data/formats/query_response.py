"""Question and answer in two columns, whatever they are called: query/response, question/answer, prompt/response, ...

GSM8K (`question`, `answer`) and Dolly (`instruction`, `context`, `response`) need no converter. A row that fills two
columns of the same meaning is refused: training on one of them would lose the other without a word.
"""

from __future__ import annotations

from typing import Any

from rayswift.data.conversation import QUERIES, conversation, only, pairs, question, required, system_turn
from rayswift.data.types import Message, Sample

RESPONSES = ("response", "answer", "output", "target", "completion", "solution")


class QueryResponse:
    """One pair per row, after an optional `system` and `history`. The question is its column, a newline and extras."""

    def matches(self, columns: frozenset[str]) -> int:
        """8 with a column for the question and one for the answer."""
        return 8 if columns & {*QUERIES, "input"} and columns & set(RESPONSES) else 0

    def normalise(self, row: dict[str, Any]) -> Sample:
        """The conversation. Raises RowError when either side is missing, empty, not text, or there twice."""
        answer = only(row, RESPONSES)
        pair = [Message("user", question(row)), Message("assistant", required(row.get(answer), answer))]
        return conversation(row, [*system_turn(row), *pairs(row.get("history"), "history"), *pair])
