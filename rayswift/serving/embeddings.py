"""The vectors of a request's texts: which model makes them, how many texts run at once, and how they are written.

Knows the engine protocol and the shape of OpenAI's reply. Knows no route.
"""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from rayswift.errors import ServeError
from rayswift.serving import flow
from rayswift.serving.api_errors import ApiError, too_long
from rayswift.serving.engine import Embedding, Engine, Prompt
from rayswift.serving.openai import ChatRequest, EmbeddingRequest, TextRequest
from rayswift.serving.traffic import CountedEngine
from rayswift.serving.versions import VERSION_HEADER

if TYPE_CHECKING:
    from rayswift.serving.served import ServedModel


def check_kind(request: ChatRequest | TextRequest | EmbeddingRequest, engine: Engine) -> None:
    """Raises ApiError (400) for vectors of a model that generates, and for answers of one that embeds."""
    wanted = isinstance(request, EmbeddingRequest)
    if wanted == (engine.embedding is not None):
        return
    api = "Embeddings" if wanted else "Chat Completions" if isinstance(request, ChatRequest) else "Completions"
    instead = "it generates text; use /v1/chat/completions" if wanted else "it makes vectors; use /v1/embeddings"
    raise ApiError(
        f"This model does not support the {api} API: {instead}", param="model", code="model_not_supported"
    )  # fmt: skip


async def reply(http: HttpRequest, request: EmbeddingRequest, model: ServedModel, deadline: float) -> Response:
    """The vectors of all texts of a request. Raises ApiError for what this model cannot take, ServeError on failure.

    A request holds a place for each text that is read at the same time, so that a long list does not fill the queue.
    """
    embedding = model.engine.embedding
    assert embedding is not None, "check_kind comes first"
    _check_dimensions(request.dimensions, embedding)
    num_places = min(len(request.input), model.admission.max_concurrency)
    with model.admission.enter(num_places):
        reading = asyncio.to_thread(_prompts, request, model)
        prompts = await flow.unless_gone(http, flow.before(deadline, reading))
        work = vectors_of(model.engine, [prompt.ids for prompt in prompts], request.dimensions, num_places)
        vectors = await flow.unless_gone(http, flow.before(deadline, work))
    num_tokens = sum(len(prompt.ids) for prompt in prompts)
    headers = {VERSION_HEADER: model.version} if model.version else {}
    # Two thousand vectors as text take a second, in which others are answered.
    return await asyncio.to_thread(lambda: JSONResponse(_body(request, vectors, num_tokens), headers=headers))


async def vectors_of(
    engine: Engine, texts: Sequence[Sequence[int]], num_dims: int | None, num_at_once: int
) -> list[np.ndarray]:
    """The vector of each text. What one of them raises ends all, which is one answer where answers are counted."""
    found: list[np.ndarray] = [np.empty(0)] * len(texts)
    waiting = iter(enumerate(texts))

    async def work() -> None:
        for index, ids in waiting:
            found[index] = await engine.embed(ids, num_dims)

    with engine.as_one() if isinstance(engine, CountedEngine) else nullcontext():
        tasks = [asyncio.create_task(work()) for _ in range(num_at_once)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return found


def _check_dimensions(wanted: int | None, embedding: Embedding) -> None:
    if embedding.admits(wanted):
        return
    known = f"its vectors have {embedding.num_dims} numbers"
    if embedding.is_matryoshka:
        known += f" or {', '.join(map(str, embedding.cuts))}" if embedding.cuts else " or fewer"
    else:
        known += ", and are not trained to be cut"
    raise ApiError(
        f"dimensions: {wanted} is not what this model makes; {known}", param="dimensions", code="invalid_value"
    )


def _prompts(request: EmbeddingRequest, model: ServedModel) -> list[Prompt]:
    """The tokens of each text. Raises ApiError for one that the model cannot read."""
    room, prompts = model.engine.max_model_len, list[Prompt]()
    for index, text in enumerate(request.input):
        place = f"input[{index}]"
        prompts.append(model.prompts.text(text, place))
        if (num_tokens := len(prompts[-1].ids)) > room:
            raise too_long(f"{place} has {num_tokens} tokens", room, place)
    return prompts


def _body(request: EmbeddingRequest, vectors: Sequence[np.ndarray], num_tokens: int) -> dict[str, Any]:
    if not all(np.isfinite(vector).all() for vector in vectors):
        raise ServeError("made a vector that is not finite", path="model", value=request.model)
    written = _base64 if request.encoding_format == "base64" else _numbers
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": written(vector)}
            for index, vector in enumerate(vectors)
        ],
        "model": request.model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def _numbers(vector: np.ndarray) -> list[float]:
    return [float(one) for one in vector]


def _base64(vector: np.ndarray) -> str:
    """The numbers as float32, little endian, which is what OpenAI's clients read."""
    return b64encode(vector.astype("<f4").tobytes()).decode()
