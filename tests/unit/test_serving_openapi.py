"""The OpenAPI document: valid, of exactly the routes there are, and true of what requests may hold."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate

from rayswift.models.loading import load_tokenizer
from rayswift.serving import auth, page
from rayswift.serving.admission import Admission
from rayswift.serving.api_errors import ApiError
from rayswift.serving.engine import FakeEngine
from rayswift.serving.http import build_asgi
from rayswift.serving.openai import ABSENT_OPTIONS, LABELS, ChatRequest, EmbeddingRequest, TextRequest, parse
from rayswift.serving.openapi import document
from rayswift.serving.prompts import PromptBuilder
from rayswift.serving.served import ServedModel
from rayswift.serving.spec import ServeSpec

_KEY = "a-key-for-tests-0123"
_OPEN = ServeSpec(models={"m": "unused"})
_KEYED = ServeSpec(models={"m": "unused"}, api_key_sha256=(auth.fingerprint(_KEY),))
_TURN = {"role": "user", "content": "hi"}


@pytest.mark.parametrize("spec", [_OPEN, _KEYED])
def test_it_is_valid(spec: ServeSpec) -> None:
    made = document(spec)
    validate(made)
    assert made["openapi"].startswith("3.1")
    assert made["security"] == ([{"key": []}] if spec is _KEYED else [])
    assert made["paths"]["/health"]["get"]["security"] == []


def test_it_has_exactly_the_routes_of_the_app(tiny_model_dir: Path) -> None:
    prompts = PromptBuilder(load_tokenizer(str(tiny_model_dir)))
    app: Any = build_asgi(_KEYED, {"m": ServedModel(FakeEngine(), prompts, Admission(1, 1))})
    found = {
        (route.path.replace("{name:path}", "{name}"), method.lower())
        for route in app.routes
        for method in route.methods - {"HEAD"}
        if route.path not in page.PATHS  # the chat page is for people
    }
    paths = document(_KEYED)["paths"]
    assert found == {(path, key) for path, item in paths.items() for key in item if key != "parameters"}

    async def scenario() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            assert (await client.get("/openapi.json")).status_code == 401
            shown = await client.get("/openapi.json", headers={"authorization": f"Bearer {_KEY}"})
            assert shown.json() == document(_KEYED)

    asyncio.run(scenario())


def test_every_error_is_documented_in_openais_shape() -> None:
    paths = document(_KEYED)["paths"]
    for path, item in paths.items():
        for method, operation in item.items():
            if method == "parameters":
                continue
            for status, answer in operation["responses"].items():
                schema = answer["content"]["application/json"]["schema"]
                assert (schema["$ref"] == "#/components/schemas/Error") == (status != "200"), (path, status)


def _is_documented(kind: type[ChatRequest | TextRequest | EmbeddingRequest], body: Any) -> bool:
    made = document(_OPEN)
    schema = {"$ref": f"#/components/schemas/{kind.__name__}", "components": made["components"]}
    return bool(OAS31Validator(schema).is_valid(body))


def _is_accepted(kind: type[Any], body: Any) -> bool:
    try:
        parse(kind, json.dumps(body).encode())
    except ApiError:
        return False
    return True


def _chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [_TURN], **fields}


def _text(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": "hi", **fields}


def _vectors(texts: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "input": texts, **fields}


_IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
_SAME: list[tuple[type[Any], dict[str, Any], bool]] = [
    (ChatRequest, _chat(), True),
    (ChatRequest, _chat(stop="a", seed=None, n=2, stream=True, stream_options={"include_usage": True}), True),
    (ChatRequest, _chat(stop=["a", "b"], temperature=0.5, top_p=1), True),
    (ChatRequest, _chat(messages=[{**_TURN, "name": None, "tool_calls": [], "audio": None}]), True),
    (ChatRequest, _chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}]}]), True),
    (ChatRequest, _chat(messages=[{"role": "user", "content": [_IMAGE]}]), False),
    (ChatRequest, _chat(messages=[]), False),
    (ChatRequest, _chat(messages=[_TURN] * 4097), False),
    (ChatRequest, _chat(messages=[{**_TURN, "role": "x"}]), False),
    (ChatRequest, _chat(messages=[{**_TURN, "x": 1}]), False),
    (ChatRequest, _chat(messages=[{"role": "user", "content": None}]), False),
    (ChatRequest, _chat(stop=["a"] * 5), False),
    (ChatRequest, _chat(stop="s" * 257), False),
    (ChatRequest, _chat(temperature=3), False),
    (ChatRequest, _chat(top_logprobs=21, logprobs=True), False),
    (ChatRequest, _chat(unknown=1), False),
    (ChatRequest, _chat(n=0), False),
    (TextRequest, _text(), True),
    (TextRequest, _text(prompt=["a", [1, 2]]), True),
    (TextRequest, _text(prompt=[1, 2]), True),
    (TextRequest, _text(prompt=[]), False),
    (TextRequest, _text(prompt=[-1]), False),
    (TextRequest, _text(prompt=["a"] * 2049), False),
    (TextRequest, _text(prompt=[[]]), False),
    (TextRequest, _text(logprobs=21), False),
    (TextRequest, {"model": "m"}, False),
    (EmbeddingRequest, _vectors("a"), True),
    (EmbeddingRequest, _vectors(["a", [1, 2]], encoding_format="base64", dimensions=4, user="u"), True),
    (EmbeddingRequest, _vectors([1, 2], encoding_format=None, dimensions=None), True),
    (EmbeddingRequest, _vectors(["a"] * 2048), True),
    (EmbeddingRequest, _vectors(["a"] * 2049), False),
    (EmbeddingRequest, _vectors(""), False),
    (EmbeddingRequest, _vectors(["a", ""]), False),
    (EmbeddingRequest, _vectors([]), False),
    (EmbeddingRequest, _vectors([-1]), False),
    (EmbeddingRequest, _vectors("a", dimensions=0), False),
    (EmbeddingRequest, _vectors("a", encoding_format="hex"), False),
    (EmbeddingRequest, _vectors("a", stream=True), False),
    (EmbeddingRequest, {"model": "m"}, False),
    *[(ChatRequest, _chat(**{name: value}), True) for name, values in ABSENT_OPTIONS.items() for value in values],
    *[(ChatRequest, _chat(**{name: "something"}), False) for name in ABSENT_OPTIONS],
    *[(TextRequest, _text(**{name: {"any": ["thing"]}}), True) for name in LABELS],
]  # fmt: skip


@pytest.mark.parametrize(("kind", "body", "is_right"), _SAME)
def test_what_is_documented_is_what_is_accepted(kind: type[Any], body: dict[str, Any], is_right: bool) -> None:
    assert _is_documented(kind, body) == is_right
    assert _is_accepted(kind, body) == is_right
