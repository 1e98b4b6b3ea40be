"""Tools that a model may call: how a client names them, what an answer is held to, and what is a call of one.

A model writes a call as its chat template was trained to: `<tool_call>` around JSON (Hermes, Qwen2.5 and later). Where
a call is demanded, the answer is held to that form; of a model that writes calls in another one, to a JSON Schema.
Knows no HTTP and no engine.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

import jiter
from pydantic import Field
from pydantic_core import PydanticCustomError

from rayswift.serving.formats import Schema, Strict
from rayswift.serving.schemas import ReadSchema, moved

MAX_TOOLS, MAX_CALLS, MAX_ARGUMENT_CHARS = 64, 64, 256 * 1024
OPEN, CLOSE = "<tool_call>", "</tool_call>"
_NOT_JSON = ("<function=", "<arg_key>")
"""What templates write between the same marks whose calls are no JSON (Qwen3-Coder, GLM-4.5)."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class Function(Strict):
    """A function that the model may call. Its arguments are held to `parameters`, `strict` or not.

    Where no call is demanded, `parameters` may have patterns that cannot be read here, such as those with lookaround:
    the model is shown them, and arguments are held to everything else.
    """

    name: Name
    description: Annotated[str, Field(max_length=4096)] | None = None
    parameters: Schema = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool | None = None

    def admits(self, arguments: Any, *, if_unknown: bool) -> bool:
        """Whether the function may be called with these; `if_unknown` where that would take too long to check."""
        return self._schema.admits(arguments, if_unknown=if_unknown)

    @cached_property
    def _schema(self) -> ReadSchema:
        return ReadSchema(self.parameters).readable  # once for all calls of an answer: patterns take time to compile


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


_SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How llguidance is told to write JSON."""


def is_readable(template: str) -> bool:
    """Whether a chat template has a model write calls as this server reads them."""
    return OPEN in template and not any(mark in template for mark in _NOT_JSON)


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
    is_written: bool = False
    """Whether a demanded call is written between the marks, as the model was trained to, and not as bare JSON."""

    def for_template(self) -> list[dict[str, Any]]:
        """The tools as chat templates take them."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    @property
    def is_named(self) -> bool:
        """Whether one function is demanded by its name."""
        return self.demanded not in (None, "*")

    @property
    def grammar(self) -> str | None:
        """The Lark grammar, as llguidance has it, of an answer that has to call in the model's own form; None else.

        JSON is spaced as templates write it: what a model was trained on is what it is held to.
        """
        if self.demanded is None or not self.is_written:
            return None
        functions = [tool.function for tool in self.tools if not self.is_named or tool.function.name == self.demanded]
        more = "" if self.is_named else f"(NEWLINE? call){{0,{MAX_CALLS - 1}}}"
        either = " | ".join(f"call_{number}" for number in range(len(functions)))
        rules = [f"start: call {more}", f'call: "{OPEN}" NEWLINE? ({either}) NEWLINE? "{CLOSE}"', r"NEWLINE: /\n/"]
        for number, function in enumerate(functions):
            begin = json.dumps(f'{{"name": "{function.name}", "arguments": ')
            schema = json.dumps(function.parameters | {"x-guidance": _SPACED})
            rules += [f'call_{number}: {begin} arguments_{number} "}}"', f"arguments_{number}: %json {schema}"]
        return "\n".join(rules)

    @property
    def schema_text(self) -> str | None:
        """The JSON Schema of an answer that has to call, as text; None where it is held to none."""
        if self.demanded is None or self.is_written:
            return None
        if self.demanded != "*":
            return json.dumps(self._function(self.demanded).parameters)
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "arguments": {"$ref": f"#/$defs/tool_{number}"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for number, tool in enumerate(self.tools)
        ]
        own = {f"tool_{i}": moved(tool.function.parameters, f"/$defs/tool_{i}") for i, tool in enumerate(self.tools)}
        items = {"anyOf": calls}
        return json.dumps({"type": "array", "minItems": 1, "maxItems": MAX_CALLS, "items": items, "$defs": own})

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
        """The call that a model wrote between its marks; None for what calls no tool or breaks that tool's schema.

        What takes too long to check is a call where it was demanded: the grammar has held it to the schema. Where the
        model chose it, nothing has, and clients rely on calls that keep to it: it stays text.
        """
        try:
            found = _parsed(text)
            arguments = found["arguments"]
            arguments = _parsed(arguments) if isinstance(arguments, str) else arguments
            if not self._function(found["name"]).admits(arguments, if_unknown=self.demanded is not None):
                return None
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
