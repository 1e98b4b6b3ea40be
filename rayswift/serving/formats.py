"""What an answer is to be: free text, a JSON object, or JSON after a schema of the client's, within bounds.

Pydantic models only. What a schema may cost is known by `serving/schemas.py`; whether it can be kept to, by the engine.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from rayswift.serving.schema_costs import Room
from rayswift.serving.schemas import ReadSchema

_SHOWN_CHARS = 200
_ANY_OBJECT = {"type": "object"}


def bounded_schema(schema: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    """The schema. Raises PydanticCustomError for one that is none, or costs more than this server gives.

    The context of the validation is the room of the request, which its schemas share; without one, each has it all.
    """
    return _checked(schema, _room(info))


def _held_schema(schema: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    return _checked(schema, _room(info).for_grammar())


def _room(info: ValidationInfo) -> Room:
    return info.context if isinstance(info.context, Room) else Room()


def _checked(schema: dict[str, Any], room: Room) -> dict[str, Any]:
    try:
        ReadSchema(schema).check(room)
    except ValueError as error:
        raise PydanticCustomError("schema", "{reason}", {"reason": str(error)[:_SHOWN_CHARS]}) from None
    return schema


Schema = Annotated[dict[str, Any], AfterValidator(bounded_schema)]
HeldSchema = Annotated[dict[str, Any], AfterValidator(_held_schema)]
"""One that answers are held to by a grammar, which is made of all of it."""


class Strict(BaseModel):
    """Base of what clients send: no unknown keys, no other types than JSON's own."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class JsonSchema(Strict):
    """A named JSON Schema. It is kept to whether or not `strict` asks for it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Annotated[str, Field(max_length=1024)] | None = None
    schema_: HeldSchema = Field(alias="schema")
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
