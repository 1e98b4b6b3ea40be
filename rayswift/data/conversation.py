"""What every conversational format shares: turns, roles and their order, tools, and typed access to columns.

Roles of a Message are `system`, `user`, `assistant`, `tool` (a tool's answer) and `tool_call`, whose content is
the JSON `{"name": ..., "arguments": {...}}`; `rendering` hands it to the template as the assistant's call.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import Any

from rayswift.config.job import Tag
from rayswift.data.content_parts import spread
from rayswift.data.formats import RowError
from rayswift.data.media import MARKS
from rayswift.data.media.columns import COLUMNS, attach, part_medium
from rayswift.data.types import Medium, Message, Sample

_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "ipython": "tool",
    "function_call": "tool_call", "tool_call": "tool_call",
}  # fmt: skip
_FOLLOWS = {
    None: {"system", "user"},
    "system": {"user"},
    "user": {"assistant", "tool_call"},
    "assistant": {"user", "tool_call"},
    "tool_call": {"tool_call", "tool"},
    "tool": {"tool", "tool_call", "assistant", "user"},  # Anthropic: the user speaks behind what a tool answers
}
QUERIES = ("query", "question", "prompt", "instruction", "problem")
EXTRAS = ("input", "context")
"""What a question is about. `input` alone is the question."""
_TAGS: dict[Tag, str] = {
    "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "function_tag": "tool_call",
    "system_tag": "system",
}  # fmt: skip


def conversation(row: dict[str, Any], messages: Sequence[Message], *, rejected: Sequence[Message] = ()) -> Sample:
    """A Sample of these turns with the row's media, tools and label. Raises RowError for turns in no order, or without
    a last answer, and for media that do not fit their tags."""
    messages = attach(row, messages)
    check_order(messages)
    if rejected:
        rejected = attach(row, rejected)
        check_order(rejected)
    label = row.get("label")
    return Sample(
        messages=tuple(messages),
        tools=tools_of(row.get("tools")),
        rejected=tuple(rejected),
        label=label if isinstance(label, bool) else None,  # a class of a classifier is no judgement of an answer
    )


def turns(value: Any, name: str) -> list[Message]:
    """The turns of a column of `{role, content}` or `{from, value}` objects, or of the JSON text of such a list."""
    value = from_json(value, name)
    if value is None or value == []:
        raise RowError(f"has no `{name}`")
    if not isinstance(value, list):
        raise RowError(f"`{name}` is {kind(value)}, not a list of turns")
    written = ((number, turn) for number, one in enumerate(value, 1) for turn in spread(one, number))
    return [message for number, turn in written for message in _turn(turn, number)]


def retagged(value: Any, tags: Mapping[Tag, str]) -> Any:
    """Turns with the keys and roles that `tags` names (`role_tag`, `user_tag`, ...) renamed; anything else as it is.

    A role that a tag does not name keeps its own name, and is refused later if nobody knows it.
    """
    if isinstance(value, dict):
        return _retagged_turn(value, tags)
    return (
        [_retagged_turn(turn, tags) if isinstance(turn, dict) else turn for turn in value]
        if isinstance(value, list)
        else value
    )


def _retagged_turn(turn: dict[str, Any], tags: Mapping[Tag, str]) -> dict[str, Any]:
    role_key, content_key = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    named = {name: role for tag, role in _TAGS.items() if (name := tags.get(tag))}
    kept = {key: value for key, value in turn.items() if key not in (role_key, content_key)}
    role = turn.get(role_key)
    if role_key in turn:
        kept["role"] = named.get(role, role) if isinstance(role, str) else role
    return kept | ({"content": turn[content_key]} if content_key in turn else {})


def pairs(value: Any, name: str) -> list[Message]:
    """The turns of a `history` column: a list of [question, answer] pairs; none when it is absent."""
    value = from_json(value, name) or []
    if not isinstance(value, list) or any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in value):
        raise RowError(f"`{name}` is not a list of [question, answer] pairs")
    roles = ("user", "assistant")
    return [Message(role, text(part, name)) for pair in value for role, part in zip(roles, pair, strict=True)]


def question(row: dict[str, Any]) -> str:
    """The question of a pair, whatever its column is called, a newline and extras. Raises RowError without one."""
    query = only(row, QUERIES if _filled(row, QUERIES) else (*QUERIES, "input"))
    extras = [text(row.get(name), name) for name in EXTRAS if name != query]
    return "\n".join([required(row.get(query), query), *(extra for extra in extras if extra.strip())])


def only(row: dict[str, Any], names: tuple[str, ...]) -> str:
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


def check_order(messages: Sequence[Message]) -> None:
    """Raises RowError unless system comes first, turns alternate, and the assistant has the last, non-empty word."""
    before: str | None = None
    for number, message in enumerate(messages, 1):
        if message.role not in _FOLLOWS[before]:
            place = f"after {before}" if before else "first"
            raise RowError(f"turn {number} is {message.role} {place}; expected {' or '.join(sorted(_FOLLOWS[before]))}")
        if message.role == "assistant" and not message.content.strip():
            raise RowError(f"turn {number}, an answer of the assistant, is empty")
        before = message.role
    if before not in ("assistant", "tool_call"):
        raise RowError(f"ends with a turn of {before or 'nobody'}; there is no answer to train on")


def text(value: Any, name: str) -> str:
    """The text in a column; null is the empty text. Raises RowError for any other type."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"`{name}` is {kind(value)}, not text")
    return value


def required(value: Any, name: str) -> str:
    """As `text`, but raises RowError when there is nothing but white space."""
    found = text(value, name)
    if not found.strip():
        raise RowError(f"`{name}` is {'empty' if value is not None else 'missing'}")
    return found


def system_turn(row: dict[str, Any]) -> list[Message]:
    """The row's own system message, in a list, or an empty list."""
    system, _ = _content(row.get("system"), "system")
    return [Message("system", system)] if system.strip() else []


def tools_of(value: Any) -> tuple[dict[str, Any], ...]:
    """Tool declarations as JSON schemas of the OpenAI kind, from a list of objects or its JSON text."""
    value = from_json(value, "tools") or []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("`tools` is not a list of objects")
    return tuple(_tool(tool, number) for number, tool in enumerate(value, 1))


def reject_media(row: dict[str, Any]) -> None:
    """Raises RowError for images, audio and video: dropping them would train on an answer to nothing."""
    for name in COLUMNS:
        if row.get(name):
            raise RowError(f"has `{name}`, and as plain text only text is trained on")


def from_json(value: Any, name: str) -> Any:
    """The value, parsed when it is the JSON text of a list: CSV and many Parquet files hold lists so."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError as error:
        raise RowError(f"`{name}` is text, and not the JSON of a list: {error}") from error


def kind(value: object) -> str:
    """`a number`, `a list`, ... for an error message."""
    names = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _turn(turn: Any, number: int) -> Iterable[Message]:
    if not isinstance(turn, dict):
        raise RowError(f"turn {number} is {kind(turn)}, not an object")
    role = turn.get("role") or turn.get("from")  # Parquet gives every turn the keys of all, null where it has none
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise RowError(f"turn {number} has the role {role!r}; known are {', '.join(sorted(_ROLES))}")
    name = "value" if turn.get("content") is None and "value" in turn else "content"
    content, media = _content(turn.get(name), f"{name} of turn {number}")
    loss = _loss(turn, number, answers=_ROLES[role.lower()] in ("assistant", "tool_call"))
    thought = _reasoning(turn, number, _ROLES[role.lower()])
    calls = turn.get("tool_calls") or []
    if _ROLES[role.lower()] == "tool_call":
        calls, content = from_json(content, f"{name} of turn {number}"), ""
        calls = calls if isinstance(calls, list) else [calls]
    elif content.strip() or not calls:
        yield Message(_ROLES[role.lower()], content, loss, thought, media)
        thought = ""
    for place, call in enumerate(calls):
        yield Message("tool_call", _call(call, number), loss, "" if place else thought)


def _content(value: Any, name: str) -> tuple[str, tuple[Medium, ...]]:
    """The text of a message, with marks where its media stand; OpenAI also writes it as a list of typed parts."""
    if not isinstance(value, list):
        return _unmarked(text(value, name), name), ()
    pieces, media = [], []
    for part in value:
        medium = part_medium(part, name) if isinstance(part, dict) else None
        if medium is not None:
            pieces.append(MARKS[medium.kind])
            media.append(medium)
        elif isinstance(part, dict) and part.get("type") in ("text", "input_text", "output_text"):
            pieces.append(_unmarked(text(part.get("text"), name), name))
        else:
            raise RowError(f"`{name}` has a part that is neither text nor an image, audio or video")
    return "".join(pieces), tuple(media)


def _unmarked(found: str, name: str) -> str:
    if any(mark in found for mark in MARKS.values()):
        raise RowError(f"`{name}` has a character of Unicode's private use area that stands for media here")
    return found


def _loss(turn: dict[str, Any], number: int, *, answers: bool) -> float | None:
    """What each token of a turn counts, None for what its role says.

    `loss` (ms-swift) takes a turn in or out; `loss_scale` (ms-swift) and `weight` (OpenAI) scale what is in.
    """
    loss = _weight(turn, "loss", number)
    scale = _weight(turn, "loss_scale", number)
    if scale is None:
        scale = _weight(turn, "weight", number)
    if scale is None or (loss is None and not answers):
        return loss
    return scale if loss is None else loss * scale


def _weight(turn: dict[str, Any], name: str, number: int) -> float | None:
    value = turn.get(name)
    if value is None or (isinstance(value, int | float) and 0 <= value < inf):
        return int(value) if isinstance(value, bool) else value
    raise RowError(f"`{name}` of turn {number} is {value!r}, not true, false or a number from 0 up")


def _reasoning(turn: dict[str, Any], number: int, role: str) -> str:
    """What the assistant thought before it answered, as the chat template takes it."""
    found = text(turn.get("reasoning_content"), f"reasoning_content of turn {number}")
    if found.strip() and role not in ("assistant", "tool_call"):
        raise RowError(f"turn {number} has `reasoning_content`, which only an assistant has, and is {role}")
    return found if found.strip() else ""


def _tool(tool: dict[str, Any], number: int) -> dict[str, Any]:
    """Also a bare function, as ShareGPT rows have them, and Anthropic's, which calls its parameters `input_schema`."""
    function = tool.get("function", tool)
    if isinstance(function, dict) and "input_schema" in function:
        kept = {key: value for key, value in function.items() if key not in ("input_schema", "cache_control")}
        function = {**kept, "parameters": function["input_schema"]}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError(f"tool {number} of `tools` has no function with a name")
    return tool if "function" in tool else {"type": "function", "function": function}


def _call(call: Any, number: int) -> str:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"turn {number} has a tool call without a name")
    arguments = from_json(function.get("arguments"), f"arguments of turn {number}")
    return json.dumps({"name": function["name"], "arguments": arguments or {}}, ensure_ascii=False)
