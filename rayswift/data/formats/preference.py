"""Preference pairs: a prompt, the answer that was `chosen` and the one that was `rejected`.

The prompt is in a column of its own (TRL's `prompt`, LLaMA-Factory's `conversations` or `instruction` and `input`), or
both sides are whole conversations that begin alike (TRL), or the chosen answer ends `messages` and the other is
`rejected_response` or `rejected_messages` (ms-swift).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rayswift.data.conversation import conversation, from_json, pairs, question, required, system_turn, turns
from rayswift.data.formats import RowError
from rayswift.data.types import Message, Sample

_PAIR = {"chosen", "rejected"}
_OTHERS = ("rejected_messages", "rejected_response")


class Preference:
    """`messages` of the Sample end with the chosen answer, `rejected` is the same conversation with the other."""

    def matches(self, columns: frozenset[str]) -> int:
        """20 with both answers: such rows have a prompt column too, which other formats would take for theirs."""
        return 20 if columns >= _PAIR or columns & set(_OTHERS) else 0

    def normalise(self, row: dict[str, Any]) -> Sample:
        """Both conversations. Raises RowError for an answer that is missing, or two that are the same."""
        chosen, rejected = _split(row) if row.keys() >= _PAIR else _beside(row)
        system = [] if chosen[0].role == "system" else system_turn(row)
        if chosen == rejected:
            raise RowError("has the same answer as chosen and as rejected")
        return conversation(row, [*system, *chosen], rejected=[*system, *rejected])


def _split(row: dict[str, Any]) -> tuple[list[Message], list[Message]]:
    chosen, rejected = (_side(row.get(name), name) for name in ("chosen", "rejected"))
    if len(chosen) > 1 and chosen[0].role in ("system", "user"):  # whole conversations
        if _prompt_of(chosen) != _prompt_of(rejected):
            raise RowError("has `chosen` and `rejected` that do not answer the same conversation")
        return chosen, rejected
    prompt = _prompt(row)
    return [*prompt, *chosen], [*prompt, *rejected]


def _beside(row: dict[str, Any]) -> tuple[list[Message], list[Message]]:
    chosen = turns(row.get("messages"), "messages")
    name = next((name for name in _OTHERS if row.get(name)), _OTHERS[-1])
    other = from_json(row.get(name), name) if name == "rejected_messages" else row.get(name)
    rejected = _side(other, name)
    if rejected[0].role in ("system", "user"):
        return chosen, rejected
    return chosen, [*_prompt_of(chosen), *rejected]


def _side(value: Any, name: str) -> list[Message]:
    """One answer, as a text, a turn, or a list of turns."""
    if isinstance(value, dict):
        value = [value]
    return turns(value, name) if isinstance(value, list) else [Message("assistant", required(value, name))]


def _prompt(row: dict[str, Any]) -> list[Message]:
    for name in ("conversations", "messages", "prompt"):
        if isinstance(row.get(name), list):
            return turns(row[name], name)
    return [*pairs(row.get("history"), "history"), Message("user", question(row))]


def _prompt_of(messages: Sequence[Message]) -> list[Message]:
    """All before the last answer, its calls of tools and what they gave included in that answer."""
    last = max((place for place, message in enumerate(messages) if message.role == "user"), default=-1)
    return list(messages[: last + 1])
