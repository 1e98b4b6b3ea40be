"""schemathesis asks the endpoint what its OpenAPI document allows and forbids: no 5xx, and no undocumented answer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    negative_data_rejection,
    not_a_server_error,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from rayswift.models.loading import load_tokenizer
from rayswift.serving import auth
from rayswift.serving.admission import Admission
from rayswift.serving.engine import Embedding, FakeEngine
from rayswift.serving.http import build_asgi
from rayswift.serving.openapi import document
from rayswift.serving.prompts import PromptBuilder
from rayswift.serving.served import ServedModel
from rayswift.serving.spec import ServeSpec

_KEY = "a-key-for-tests-0123"
_CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_headers_conformance,
    response_schema_conformance, negative_data_rejection, unsupported_method,
]  # fmt: skip


_VECTORS = "/v1/embeddings"
_SPEC = ServeSpec(models={"m": "unused", "e": "unused"}, api_key_sha256=(auth.fingerprint(_KEY),))
_HEADERS = {"Authorization": f"Bearer {_KEY}"}
_OPERATIONS = [
    (path, method) for path, item in document(_SPEC)["paths"].items() for method in ("get", "post") if method in item
]


@pytest.fixture(scope="module")
def api(tiny_model_dir: Path) -> Any:
    """The document as the endpoint serves it, to a client with a key."""
    engines = {"m": FakeEngine(can_constrain=True), "e": FakeEngine(embedding=Embedding(8, is_matryoshka=True))}
    prompts = PromptBuilder(load_tokenizer(str(tiny_model_dir)), None, _SPEC.max_media, engines["m"].max_model_len)
    app = build_asgi(_SPEC, {name: ServedModel(one, prompts, Admission(16, 64)) for name, one in engines.items()})
    refusals = ["400", "401", "403", "404", "405", "413", "415"]  # its own have no 413: an argument of 2 MB is drawn
    config = schemathesis.Config.from_dict({"checks": {"negative_data_rejection": {"expected-statuses": refusals}}})
    return schemathesis.openapi.from_asgi("/openapi.json", app, headers=_HEADERS, config=config)


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize(("path", "method"), _OPERATIONS)
def test_every_answer_is_one_that_is_documented(api: Any, path: str, method: str, mode: GenerationMode) -> None:
    operation, asked, num_streams = api[path][method.upper()], Counter[int](), 0

    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    @hypothesis.settings(
        max_examples=100, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    def ask(case: Any) -> None:
        nonlocal num_streams
        if mode is GenerationMode.POSITIVE and method == "post" and asked.total() % 2:
            round_ = asked.total() // 2
            _make_answerable(case.body, stream=round_ % 2 == 0, plain=round_ % 4 < 2, embeds=path == _VECTORS)
        response = case.call(headers=_HEADERS)
        asked[response.status_code] += 1
        num_streams += response.headers["content-type"][0].startswith("text/event-stream")
        case.validate_response(response, checks=_CHECKS)

    try:
        ask()
    except hypothesis.errors.Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE
        assert method == "get", "a request without anything to get wrong"
    if mode is GenerationMode.POSITIVE:
        assert asked[200] or "{" in path, "nothing was ever answered"
        assert bool(num_streams) == (method == "post" and path != _VECTORS)
    elif method == "post":
        assert asked[400] > 20


def _make_answerable(body: dict[str, Any], *, stream: bool, plain: bool, embeds: bool) -> None:
    """Half of the requests ask the model that is there for what it has room for; half of those for a stream.

    Half of either is `plain`: without schemas and tools, of which many that are drawn cannot be answered.
    """
    if embeds:
        body.pop("dimensions", None)
        body["model"] = "e"
        return
    body["stream"], body["model"] = stream, "m"
    for name in ("tools", "tool_choice", "response_format") if plain else ("seed",):
        body.pop(name, None)
    if not plain and "messages" in body:  # of which most that are drawn come to no tool
        body["messages"] = [{"role": "user", "content": "x"}]
    if not body["stream"]:
        body.pop("stream_options", None)
    for name in ("max_tokens", "max_completion_tokens", "n"):
        body.pop(name, None)
