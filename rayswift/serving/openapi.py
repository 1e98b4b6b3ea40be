"""The OpenAPI document of an endpoint: its routes, what requests may hold, and every answer with its status.

Made from the pydantic models that requests are parsed with, so that a cap stands in one place. Knows what those models
accept before they validate: single values for lists, nulls, and options that ask for nothing. Served behind the key
like every other route.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rayswift import __version__
from rayswift.serving import openai
from rayswift.serving.messages import MESSAGE_EXTRAS
from rayswift.serving.openai import ChatRequest, EmbeddingRequest, TextRequest
from rayswift.serving.spec import ServeSpec

PATH = "/openapi.json"
_REFS = "#/components/schemas/{model}"
_WRONG = {
    "400": "The request is malformed, over a limit, or asks for what this server lacks.",
    "401": "There is no API key, or a wrong one.",
    "403": "The key may not ask this model; or, without keys, the Host is not this machine.",
    "404": "There is no such model or route.",
    "408": "The body did not arrive in time.",
    "413": "The body is larger than this server takes.",
    "415": "The body is not JSON in UTF-8, or is encoded.",
    "429": "The queue is full, or the key is at a limit of its own.",
    "503": "The answer could not be finished now: an engine failed, a replica ended, or it took too long.",
}


def route(spec: ServeSpec) -> Route:
    """The route that shows the document."""
    made = document(spec)

    async def show(_: Request) -> Response:
        return JSONResponse(made)

    return Route(PATH, show, methods=["GET"])


def document(spec: ServeSpec) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the endpoint of a spec whose keys have been read."""
    reading, asking = ("401", "403", "404", "429"), tuple(_WRONG)
    paths = {
        "/health": {"get": _operation("Whether every engine can answer", "Health", ("403", "503"), is_open=True)},
        "/v1/models": {"get": _operation("The models that the key may ask", "ModelList", ("401", "403", "429"))},
        "/v1/models/{name}": {"get": _operation("One model", "Model", reading), "parameters": [_parameter()]},
        "/v1/chat/completions": {
            "post": _operation("Answer a conversation", "ChatCompletion", asking, body="ChatRequest")
        },
        "/v1/completions": {"post": _operation("Continue a text", "TextCompletion", asking, body="TextRequest")},
        "/v1/embeddings": {
            "post": _operation("The vectors of texts", "Embeddings", asking, body="EmbeddingRequest", streams=False)
        },
        PATH: {"get": _operation("This document", "OpenAPI", ("401", "403", "429"))},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "RaySwift endpoint", "version": __version__, "description": _limits(spec)},
        "paths": paths,
        "components": {
            "schemas": {**_requests(), **_ANSWERS},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}] if spec.has_keys else [],
    }


def _limits(spec: ServeSpec) -> str:
    return (
        f"At most {spec.max_choices} answers, or vectors of {openai.MAX_PROMPTS} texts, and {spec.max_body_bytes} "
        f"bytes of text per request, "
        f"{spec.max_new_tokens} tokens per answer, {spec.max_media} images and sounds of {spec.max_media_bytes} bytes, "
        f"{spec.max_media_pixels} pixels per image, {spec.max_media_seconds:g} s per sound, and "
        f"{spec.request_timeout_s:g} s per request. No URL is fetched."
    )


def _operation(
    summary: str,
    answer: str,
    errors: tuple[str, ...],
    *,
    body: str | None = None,
    streams: bool = True,
    is_open: bool = False,
) -> dict[str, Any]:
    whole = {"application/json": {"schema": _ref(answer)}}
    streamed = {"text/event-stream": {"schema": _ref("Event")}} if body and streams else {}
    responses: dict[str, Any] = {"200": {"description": summary, "content": whole | streamed}}
    for status in errors:
        responses[status] = {
            "description": _WRONG[status],
            "content": {"application/json": {"schema": _ref("Error")}},
            **({"headers": {"Retry-After": {"schema": {"type": "string"}}}} if status in ("429", "503") else {}),
        }
    made: dict[str, Any] = {"summary": summary, "responses": responses}
    if body:
        made["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(body)}}}
    return made | ({"security": []} if is_open else {})


def _parameter() -> dict[str, Any]:
    return {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REFS.format(model=name)}


def _requests() -> dict[str, Any]:
    """The schemas of the bodies and of what is in them, as clients may write them."""
    found: dict[str, Any] = {}
    for kind in (ChatRequest, TextRequest, EmbeddingRequest):
        made = kind.model_json_schema(ref_template=_REFS)
        found |= made.pop("$defs", {}) | {kind.__name__: _as_sent(made)}
    turn = found["Message"]["properties"]
    turn["content"] = _CONTENT
    for name in MESSAGE_EXTRAS:
        turn.setdefault(name, {"enum": [None, []], "description": "as the client got it with an answer"})
    return {name: schema for name, schema in found.items() if name not in ("Content", "Medium")}


def _as_sent(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with what is accepted beside its fields: nulls, labels, and options that ask for nothing."""
    fields = schema["properties"]
    if "stop" in fields:
        fields["stop"] = {"anyOf": [fields["stop"]["items"], fields["stop"]]}
    if "prompt" in fields:
        fields["prompt"] = _texts(_TEXT)
    if "input" in fields:
        fields["input"] = _texts(_SOME_TEXT)
    for name in set(fields) - set(schema["required"]):
        fields[name] = {"anyOf": [fields[name], {"type": "null"}]}
    for name, values in openai.ABSENT_OPTIONS.items():
        fields.setdefault(name, {"enum": [*values, None], "description": "accepted where it asks for nothing"})
    for name in openai.LABELS:
        fields.setdefault(name, {"description": "a label, which changes nothing"})
    return schema


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {**required, **optional}, "required": list(required)}


def _part(kind: str, value: dict[str, Any]) -> dict[str, Any]:
    return {**_object({"type": {"const": kind}, kind: value}), "additionalProperties": False}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _texts(text: dict[str, Any]) -> dict[str, Any]:
    """One text or several, each as a string or as token ids; `text` is what a string among several may be."""
    several = {**_list({"anyOf": [text, _IDS]}), "minItems": 1, "maxItems": openai.MAX_PROMPTS}
    return {"anyOf": [_SOME_TEXT, _IDS, several]}


_TEXT, _COUNT, _NUMBER = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "number"}
_SOME_TEXT = {"type": "string", "minLength": 1}
_MAYBE_TEXT = {"type": ["string", "null"]}
_URL = {**_object({"url": {"type": "string", "pattern": "^data:"}}), "additionalProperties": False}
_URL["properties"]["detail"] = {"enum": ["auto", None]}
_SOUND = _object({"data": _TEXT, "format": {"enum": ["wav", "mp3"]}}) | {"additionalProperties": False}
_CONTENT = {
    "anyOf": [
        _TEXT,
        _list({"anyOf": [_part("text", _TEXT), _part("image_url", _URL), _part("input_audio", _SOUND)]}),
    ]
}
_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}}
_USAGE = _object({"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT})
_SCORED = {"token": _TEXT, "logprob": _NUMBER, "bytes": {"type": ["array", "null"], "items": _COUNT}}
_SCORES = _object({"content": _list(_object({**_SCORED, "top_logprobs": _list(_object(_SCORED))}))})
_TEXT_SCORES = _object(
    {
        "tokens": _list(_TEXT),
        "token_logprobs": _list(_NUMBER),
        "top_logprobs": _list({"type": "object", "additionalProperties": _NUMBER}),
        "text_offset": _list(_COUNT),
    }
)
_MODEL = _object(
    {
        "id": _TEXT,
        "object": {"const": "model"},
        "created": _COUNT,
        "owned_by": _TEXT,
        "max_model_len": {**_COUNT, "description": "Most tokens of prompt and answer together."},
        "task": {"enum": ["generate", "embed"], "description": "Whether it answers, or makes vectors."},
        "rayswift": {
            "anyOf": [_object({"version": _TEXT}), {"type": "null"}],
            "description": "The version of an export and what it was made of; null for a folder that is none.",
        },
    }
)


def _reply(kind: str, scores: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    choice = _object(
        {"index": _COUNT, "finish_reason": _TEXT, "logprobs": {"anyOf": [scores, {"type": "null"}]}, **said}
    )
    head = {"id": _TEXT, "object": {"const": kind}, "created": _COUNT, "model": _TEXT}
    return _object({**head, "choices": {**_list(choice), "minItems": 1}, "usage": _USAGE})


_ANSWERS = {
    "Error": _object({"error": _object({"message": _TEXT, "type": _TEXT, "param": _MAYBE_TEXT, "code": _MAYBE_TEXT})}),
    "Event": {
        **_object({"data": {"type": "string", "contentMediaType": "application/json"}}),
        "description": "One event of a stream: a chunk, an error as in Error, or [DONE] at the end",
    },
    "Health": _object({"status": {"const": "ok"}}),
    "Model": _MODEL,
    "ModelList": _object({"object": {"const": "list"}, "data": _list(_MODEL)}),
    "ChatCompletion": _reply(
        "chat.completion",
        _SCORES,
        {"message": _object({"role": {"const": "assistant"}, "content": _MAYBE_TEXT, "refusal": _MAYBE_TEXT})},
    ),
    "TextCompletion": _reply("text_completion", _TEXT_SCORES, {"text": _TEXT}),
    "Embeddings": _object(
        {
            "object": {"const": "list"},
            "data": _list(
                _object(
                    {
                        "object": {"const": "embedding"},
                        "index": _COUNT,
                        "embedding": {
                            "anyOf": [_list(_NUMBER), {"type": "string", "contentEncoding": "base64"}],
                            "description": "Numbers, or for encoding_format base64 the bytes of float32, little endian",
                        },
                    }
                )
            ),
            "model": _TEXT,
            "usage": _object({"prompt_tokens": _COUNT, "total_tokens": _COUNT}),
        }
    ),
    "OpenAPI": _object({"openapi": _TEXT, "info": {"type": "object"}, "paths": {"type": "object"}}),
}
