"""One turn of a conversation as clients send it: who says what, calls which tools, or reports what one returned."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, InstanceOf, model_validator
from pydantic_core import PydanticCustomError

from rayswift.serving.content import Content, content_of
from rayswift.serving.formats import Strict
from rayswift.serving.tools import MAX_CALLS, ToolCall

MAX_NAME_CHARS = 64
_MAX_MESSAGE_KEYS = 16
# What the official client sends back with an answer it was given; empty, it says nothing.
MESSAGE_EXTRAS = frozenset({"refusal", "audio", "annotations", "function_call", "tool_calls"})


class Message(Strict):
    """One turn of a conversation. `developer` is the API's newer word for `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[InstanceOf[Content], BeforeValidator(content_of)]
    tool_calls: list[ToolCall] = Field(default_factory=list, max_length=MAX_CALLS)
    tool_call_id: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)] | None = None
    name: Annotated[str, Field(max_length=MAX_NAME_CHARS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty_extras(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        if len(raw) > _MAX_MESSAGE_KEYS:  # each would become an error of its own
            raise PydanticCustomError("message", f"has more than {_MAX_MESSAGE_KEYS} keys")
        given = {key: value for key, value in raw.items() if not _says_nothing(key, value)}
        # An assistant that only called has no text.
        return given | {"content": ""} if given.get("tool_calls") and given.get("content") is None else given

    @model_validator(mode="after")
    def _role_has_its_fields(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tool_calls", "only an assistant has tool_calls")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise PydanticCustomError("tool_call_id", "a tool message, and no other, has a tool_call_id")
        for call in self.tool_calls:
            call.for_template()
        return self


def _says_nothing(key: str, value: Any) -> bool:
    """Whether a key of a message may as well be absent. A null content is not: it is told as a wrong value."""
    return (value is None and key != "content") or (key in MESSAGE_EXTRAS and value == [])
