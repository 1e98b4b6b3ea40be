"""Tools that a model may call: how a client names them, what an answer is held to, and calls read out of its text.

A model writes a call as its chat template was trained to: `<tool_call>` around JSON (Hermes, Qwen2.5 and later). Where
a call is demanded, the answer is held to a JSON Schema instead. Knows no HTTP and no engine.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import jiter
from pydantic import Field
from pydantic_core import PydanticCustomError

from rayswift.serving.formats import Schema, Strict, validator

MAX_TOOLS, MAX_CALLS, MAX_ARGUMENT_CHARS = 64, 64, 256 * 1024
OPEN, CLOSE = "<tool_call>", "</tool_call>"
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class Function(Strict):
    """A function that the model may call. Its arguments are held to `parameters`, `strict` or not."""

    name: Name
    description: Annotated[str, Field(max_length=4096)] | None = None
    parameters: Schema = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool | None = None


class Tool(Strict):
    """An entry of `tools`."""

    type: Literal["function"]
    function: Function


class _Named(Strict):
    name: Name


class NamedChoice(Strict):
    """A `tool_choice` that demands one function."""

    type: Literal["function"]
    function: _Named


class CalledFunction(Strict):
    """What an assistant called, its arguments as JSON text."""

    name: Name
    arguments: Annotated[str, Field(max_length=MAX_ARGUMENT_CHARS)]


class ToolCall(Strict):
    """A call of an earlier turn, as the client was told of it."""

    id: Annotated[str, Field(min_length=1, max_length=64)]
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """The call as chat templates take it, its arguments as an object. Raises PydanticCustomError for no object."""
        try:
            arguments = _parsed(self.function.arguments or "{}")
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise PydanticCustomError("tool_calls", "the arguments of a tool call must be a JSON object as text")
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


def _parsed(text: str) -> Any:
    """What a JSON text says. Raises ValueError also for what could not be written again: NaN, half a surrogate pair."""
    return jiter.from_json(text.encode(), allow_inf_nan=False, catch_duplicate_keys=True)


@dataclass(frozen=True)
class Calling:
    """The tools of one request and which of them an answer has to call.

    `demanded`: None leaves it to the model, `*` demands any of them, a name demands that one.
    """

    tools: tuple[Tool, ...]
    demanded: str | None = None

    def for_template(self) -> list[dict[str, Any]]:
        """The tools as chat templates take them."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    @property
    def schema_text(self) -> str | None:
        """The JSON Schema of an answer that has to call, as text; None where the model may answer freely."""
        if self.demanded is None:
            return None
        if self.demanded != "*":
            return json.dumps(self._function(self.demanded).parameters)
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "arguments": tool.function.parameters},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool in self.tools
        ]
        return json.dumps({"type": "array", "minItems": 1, "maxItems": MAX_CALLS, "items": {"anyOf": calls}})

    def _function(self, name: str) -> Function:
        return next(tool.function for tool in self.tools if tool.function.name == name)

    def demanded_calls(self, text: str) -> tuple[Call, ...]:
        """The calls of an answer that was held to `schema_text`; none of one that was cut before its end."""
        try:
            found = _parsed(text)
        except ValueError:
            return ()
        if self.demanded != "*":
            return (Call(str(self.demanded), json.dumps(found, ensure_ascii=False)),)
        return tuple(Call(one["name"], json.dumps(one["arguments"], ensure_ascii=False)) for one in found)

    def written_call(self, text: str) -> Call | None:
        """The call that a model wrote between its marks; None for what calls no tool or breaks that tool's schema."""
        try:
            found = _parsed(text)
            arguments = found["arguments"]
            arguments = _parsed(arguments) if isinstance(arguments, str) else arguments
            validator(self._function(found["name"]).parameters).validate(arguments)
        except (ValueError, LookupError, TypeError, StopIteration):  # the validator's are ValueErrors
            return None
        return Call(found["name"], json.dumps(arguments, ensure_ascii=False))


@dataclass(frozen=True)
class Call:
    """One call that an answer makes, its arguments as JSON text."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def body(self) -> dict[str, Any]:
        """As it stands in a message."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass
class CallReader:
    """Takes an answer's text as it comes and tells apart what is said and what is called.

    Text that may be the beginning of a call is held back until it is known; what turns out to be no call is said.
    """

    calling: Calling
    _held: str = ""
    _is_behind_call: bool = False
    calls: list[Call] = field(default_factory=list)

    def feed(self, text: str, *, is_last: bool) -> tuple[str, list[Call]]:
        """What can be said and the calls that are whole now."""
        self._held += text
        if self.calling.demanded is not None:
            return self._demanded(is_last)
        said, made = "", list[Call]()
        while (start := self._held.find(OPEN)) >= 0 and (end := self._held.find(CLOSE, start)) >= 0:
            whole = self._held[start : end + len(CLOSE)]
            call = self.calling.written_call(whole[len(OPEN) : -len(CLOSE)])
            is_call = call is not None and len(self.calls) < MAX_CALLS
            said += self._say(self._held[:start]) + ("" if is_call else self._say(whole))
            if call is not None and is_call:
                made.append(call)
                self.calls.append(call)
                self._is_behind_call = True
            self._held = self._held[end + len(CLOSE) :]
        free = len(self._held) if is_last else self._free(self._held.find(OPEN))
        said, self._held = said + self._say(self._held[:free]), self._held[free:]
        return said, made

    def _say(self, text: str) -> str:
        """The text without the line ends that templates write behind a call, which nobody says."""
        if self._is_behind_call:
            text = text.lstrip()
            self._is_behind_call = not text
        return text

    def _free(self, start: int) -> int:
        """How much of what is held can be no part of a call."""
        if start >= 0:
            return start
        longest = next((n for n in range(len(OPEN) - 1, 0, -1) if self._held.endswith(OPEN[:n])), 0)
        return len(self._held) - longest

    def _demanded(self, is_last: bool) -> tuple[str, list[Call]]:
        if not is_last:
            return "", []
        made = list(self.calling.demanded_calls(self._held))
        said, self._held = ("" if made else self._held), ""
        self.calls += made
        return said, made


def calling_of(tools: Sequence[Tool], choice: str | NamedChoice | None) -> Calling | None:
    """What a request's `tools` and `tool_choice` ask for; None for no tools. Raises PydanticCustomError."""
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise PydanticCustomError("tools", "tools must have different names")
    if isinstance(choice, NamedChoice) and choice.function.name not in names:
        raise PydanticCustomError("tool_choice", "tool_choice names a function that is not among tools")
    if not tools:
        if choice not in (None, "none", "auto"):
            raise PydanticCustomError("tool_choice", "tool_choice needs tools")
        return None
    if choice == "none":
        return None
    if isinstance(choice, NamedChoice):
        return Calling(tuple(tools), choice.function.name)
    return Calling(tuple(tools), "*" if choice == "required" else None)
