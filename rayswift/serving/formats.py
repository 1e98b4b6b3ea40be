"""What an answer is to be: free text, a JSON object, or JSON after a schema of the client's, within bounds.

Pydantic models only. Whether a schema says something that can be kept to is known by the engine.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH = 32 * 1024, 32
_SHOWN_CHARS = 200
_ANY_OBJECT = {"type": "object"}


def depth(value: Any, limit: int) -> int:
    """How deep objects and lists lie in each other; `limit` + 1 for anything deeper."""
    level, found = [value], 0
    while level := [inner for one in level for inner in _inner(one)]:
        found += 1
        if found > limit:
            return found
    return found


def _inner(value: Any) -> list[Any]:
    """A container as the list of what is in it; nothing for a plain value."""
    if isinstance(value, dict):
        return list(value.values()) or [None]
    return (value or [None]) if isinstance(value, list) else []


def bounded_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema. Raises PydanticCustomError for one that is larger or deeper than this server reads."""
    if depth(schema, MAX_SCHEMA_DEPTH) > MAX_SCHEMA_DEPTH:
        raise PydanticCustomError("schema_depth", f"must be at most {MAX_SCHEMA_DEPTH} levels deep")
    if len(json.dumps(schema)) > MAX_SCHEMA_BYTES:
        raise PydanticCustomError("schema_size", f"must be at most {MAX_SCHEMA_BYTES} bytes")
    try:
        validator(schema)
    except ValueError as error:
        reason = " ".join(str(error).split())[:_SHOWN_CHARS]
        raise PydanticCustomError("schema", "is no JSON Schema: {reason}", {"reason": reason}) from None
    return schema


def validator(schema: dict[str, Any]) -> Any:
    """What validates a document against a schema. Raises ValueError for what is none.

    It fetches nothing, and its patterns take time in proportion to the text: both schema and text come from outside.
    """
    import jsonschema_rs

    return jsonschema_rs.validator_for(schema, pattern_options=jsonschema_rs.RegexOptions(), offline=True)


Schema = Annotated[dict[str, Any], AfterValidator(bounded_schema)]


class Strict(BaseModel):
    """Base of what clients send: no unknown keys, no other types than JSON's own."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class JsonSchema(Strict):
    """A named JSON Schema. It is kept to whether or not `strict` asks for it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Annotated[str, Field(max_length=1024)] | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """`response_format` of a chat completion."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("json_schema", "json_schema goes with the type json_schema, and with it alone")
        return self

    @property
    def schema_text(self) -> str | None:
        """The schema that the answer keeps to, as JSON text; None for free text."""
        if self.type == "text":
            return None
        return json.dumps(_ANY_OBJECT if self.json_schema is None else self.json_schema.schema_)
