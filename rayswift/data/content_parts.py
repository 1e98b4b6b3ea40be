"""Content that is written as a list of typed parts: Anthropic's blocks as the turns that every format shares.

Anthropic puts what a tool answers into a turn of the user, and thoughts and calls beside the text of an answer;
elsewhere they are turns and keys of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from rayswift.data.formats import RowError

_ANTHROPIC = {"thinking", "tool_use", "tool_result"}


def spread(turn: Any, number: int) -> Iterator[Any]:
    """The turns that one is meant to be: itself, unless its content has blocks of thoughts, calls or tools' answers.

    Raises RowError for blocks in a turn that cannot have them, or in an order that chat templates would change.
    """
    parts = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(parts, list) or not _ANTHROPIC & {_type(part) for part in parts}:
        yield turn
    elif turn.get("role") == "assistant":
        yield _answer(turn, parts, number)
    else:
        yield from _told(turn, parts, number)


def _type(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else None


def _answer(turn: Mapping[str, Any], parts: list[Any], number: int) -> dict[str, Any]:
    """Thoughts, then text, then calls: the order in which templates render them."""
    ranks = {"thinking": 0, "text": 1, "tool_use": 2}
    for part in parts:
        if _type(part) not in ranks:
            raise RowError(f"turn {number} has a part of type {_type(part)!r}, which an answer cannot have here")
    order = [ranks[_type(part)] for part in parts]
    if order != sorted(order):
        raise RowError(f"turn {number} has thoughts, text and calls in another order than chat templates render them")
    calls = [
        {"function": {"name": p.get("name"), "arguments": p.get("input")}} for p in parts if _type(p) == "tool_use"
    ]
    thoughts = [part.get("thinking") for part in parts if _type(part) == "thinking"]
    if not all(isinstance(thought, str) for thought in thoughts):
        raise RowError(f"turn {number} has a thought that is not text")
    return {
        **turn,
        "content": [part for part in parts if _type(part) == "text"],
        "tool_calls": calls,
        "reasoning_content": "\n".join(thoughts) or turn.get("reasoning_content"),
    }


def _told(turn: Mapping[str, Any], parts: list[Any], number: int) -> Iterator[dict[str, Any]]:
    """Each tool's answer as a turn of its own, and what the user says between and behind."""
    for of_tool, run in groupby(parts, key=lambda part: _type(part) == "tool_result"):
        if not of_tool:
            rest = list(run)
            if wrong := [_type(part) for part in rest if _type(part) in _ANTHROPIC]:
                raise RowError(f"turn {number} is {turn.get('role')} and has a part of type {wrong[0]!r}")
            yield {**turn, "content": rest}
            continue
        for part in run:
            yield {**turn, "role": "tool", "content": part.get("content")}
