"""Question and answer in two columns, whatever they are called: query/response, question/answer, prompt/response, ...

GSM8K (`question`, `answer`) and Dolly (`instruction`, `context`, `response`) need no converter. A row that fills two
columns of the same meaning is refused: training on one of them would lose the other without a word.
"""

from __future__ import annotations

from typing import Any

from rayswift.data.conversation import conversation, pairs, required, system_turn, text
from rayswift.data.formats import RowError
from rayswift.data.types import Message, Sample

QUERIES = ("query", "question", "prompt", "instruction", "problem")
EXTRAS = ("input", "context")
"""What a question is about. `input` alone is the question."""
RESPONSES = ("response", "answer", "output", "target", "completion", "solution")


class QueryResponse:
    """One pair per row, after an optional `system` and `history`. The question is its column, a newline and extras."""

    def matches(self, columns: frozenset[str]) -> int:
        """8 with a column for the question and one for the answer."""
        return 8 if columns & {*QUERIES, "input"} and columns & set(RESPONSES) else 0

    def normalise(self, row: dict[str, Any]) -> Sample:
        """The conversation. Raises RowError when either side is missing, empty, not text, or there twice."""
        answer = _only(row, RESPONSES)
        pair = [Message("user", _question(row)), Message("assistant", required(row.get(answer), answer))]
        return conversation(row, [*system_turn(row), *pairs(row.get("history"), "history"), *pair])


def _question(row: dict[str, Any]) -> str:
    query = _only(row, QUERIES if _filled(row, QUERIES) else (*QUERIES, "input"))
    extras = [text(row.get(name), name) for name in EXTRAS if name != query]
    return "\n".join([required(row.get(query), query), *(extra for extra in extras if extra.strip())])


def _only(row: dict[str, Any], names: tuple[str, ...]) -> str:
    """The column of these names that is filled; the first there is, for an error message, when none is."""
    filled = _filled(row, names)
    if len(filled) > 1:
        raise RowError(
            f"has both `{filled[0]}` and `{filled[1]}`, and which is meant is not clear: rename the other away, "
            f"as in `columns: {{{filled[1]}: unused}}`"
        )
    return filled[0] if filled else next((name for name in names if name in row), names[0])


def _filled(row: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    return [name for name in names if row.get(name) is not None and str(row[name]).strip()]
