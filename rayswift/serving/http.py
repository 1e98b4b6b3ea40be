"""The OpenAI-compatible endpoint as an ASGI app over engines: routes, streaming, disconnects and timeouts.

Knows Starlette and the engine protocol. Knows neither Ray nor torch, so that every answer to a bad request can be
tested with a fake engine in milliseconds; `serving/app.py` runs this very app inside Ray Serve.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rayswift.errors import ServeError
from rayswift.serving import bodies, embeddings, flow, gate, openai, openapi, page, replies, streams, wishes
from rayswift.serving.adapter_store import AdapterStore
from rayswift.serving.admission import Places
from rayswift.serving.api_errors import ApiError, model_not_allowed, too_large, unknown_model
from rayswift.serving.engine import Adapter, Prompt, Refused, Request
from rayswift.serving.openai import AnyRequest, ChatRequest, EmbeddingRequest, TextRequest
from rayswift.serving.prompts import PromptBuilder
from rayswift.serving.replies import Answer, Reply
from rayswift.serving.served import Served, ServedModel
from rayswift.serving.spec import ServeSpec
from rayswift.serving.versions import VERSION_HEADER


@dataclass(frozen=True)
class Work:
    """A request that may run: what the engine is to generate, in the order of the reply's choices."""

    requests: tuple[Request, ...]
    num_prompt_tokens: int
    deadline: float


def build_asgi(
    spec: ServeSpec, models: Mapping[str, Served], now_ns: Callable[[], int] = time.monotonic_ns
) -> Starlette:
    """The ASGI app that answers for these models. No CORS, no documentation pages, no route besides these.

    `now_ns` is the clock of the keys' limits.
    """
    endpoint = Endpoint(spec, models)
    app = Starlette(
        routes=[
            *page.routes(),
            Route("/health", endpoint.health, methods=["GET"]),
            Route("/v1/models", endpoint.list_models, methods=["GET"]),
            Route("/v1/models/{name:path}", endpoint.show_model, methods=["GET"]),
            Route("/v1/chat/completions", endpoint.chat, methods=["POST"]),
            Route("/v1/completions", endpoint.complete, methods=["POST"]),
            Route("/v1/embeddings", endpoint.embed, methods=["POST"]),
            openapi.route(spec),
        ],
        middleware=[Middleware(gate.Gate, key_hashes=spec.api_key_sha256, keys=spec.api_keys, now_ns=now_ns)],
        exception_handlers={
            ApiError: gate.on_api_error,
            Refused: _on_refused,
            404: gate.on_http_error,
            405: gate.on_http_error,
        },
    )
    app.router.redirect_slashes = False  # a redirect would be the one answer without words
    return app


class Endpoint:
    """The routes. One method per route; what they share lies below them as functions."""

    def __init__(self, spec: ServeSpec, models: Mapping[str, Served]) -> None:
        self._spec, self._models, self._created = spec, models, int(time.time())
        self._adapters = {base: AdapterStore(root) for base, root in spec.adapters.items()}
        self._arrivals = bodies.Arrivals(bodies.MAX_SLOW, spec.max_body_bytes + _media_bytes(spec))

    async def health(self, _: HttpRequest) -> Response:
        """200 while every engine can answer, 503 otherwise."""
        try:
            for model in self._models.values():
                model.check()
        except ServeError:
            raise ApiError("an engine has failed", status=503, headers={"Retry-After": "10"}) from None
        return JSONResponse({"status": "ok"})

    async def list_models(self, request: HttpRequest) -> Response:
        """The models served here, as far as the request's key may ask them."""
        names = dict.fromkeys(self._models)
        names |= {f"{base}:{name}": base for base, store in self._adapters.items() for name in store.names()}
        cards = [
            self._card(name, parent)
            for name, parent in names.items()
            if gate.may_ask(request, name) or (parent is not None and gate.may_ask(request, parent))
        ]
        return JSONResponse({"object": "list", "data": cards})

    async def show_model(self, request: HttpRequest) -> Response:
        """One model."""
        name = request.path_params["name"]
        self._find(request, name)
        deadline = flow.deadline_in(self._spec.request_timeout_s)
        adapter = await self._adapter(request, name, deadline)
        return JSONResponse(self._card(name, self._base(name) if adapter else None))

    def _card(self, name: str, parent: str | None) -> dict[str, Any]:
        model = self._models[parent or name]
        card = replies.model_card(name, self._created, model.max_model_len, parent)
        return {**card, "task": "embed" if model.embeds else "generate", "rayswift": None if parent else model.lineage}

    async def chat(self, request: HttpRequest) -> Response:
        """A chat completion, whole or streamed."""
        return await self._guarded(request, ChatRequest)

    async def complete(self, request: HttpRequest) -> Response:
        """A text completion, whole or streamed."""
        return await self._guarded(request, TextRequest)

    async def embed(self, request: HttpRequest) -> Response:
        """The vectors of texts."""
        return await self._guarded(request, EmbeddingRequest)

    async def _guarded(self, http: HttpRequest, kind: type[AnyRequest]) -> Response:
        """The reply, or an error body; no exception leaves, whatever went wrong."""
        try:
            return await self._answer(http, kind)
        except ApiError:
            raise
        except Exception as error:
            raise streams.told(error) from error

    async def _answer(self, http: HttpRequest, kind: type[AnyRequest]) -> Response:
        deadline = flow.deadline_in(self._spec.request_timeout_s)
        body = await bodies.read_json(http, self._arrivals, self._max_body_bytes(kind), deadline)
        bodies.check_besides_media(body, self._spec.max_body_bytes)
        request = openai.parse(kind, body)
        if isinstance(request, ChatRequest) and request.num_chars > self._spec.max_body_bytes:
            raise too_large(self._spec.max_body_bytes)
        model, adapter = self._find(http, request.model), await self._adapter(http, request.model, deadline)
        try:
            return await self._run(http, request, model, adapter, deadline)
        except Exception as error:
            failed, served = error, self._models[self._base(request.model)]
            other = None if VERSION_HEADER in http.headers else served.instead_of(model)
            if other is None or not _may_go_elsewhere(error):
                raise
            if not isinstance(error, ApiError | Refused):
                gate.internal_error(error)
        reply = await self._run(http, request, other, adapter, deadline)
        if _looks_like_the_clients_fault(failed):  # and is none, as the other version has found
            served.blame(model)
        return reply

    async def _run(
        self,
        http: HttpRequest,
        request: ChatRequest | TextRequest | EmbeddingRequest,
        model: ServedModel,
        adapter: Adapter | None,
        deadline: float,
    ) -> Response:
        embeddings.check_kind(request, model.engine)
        if isinstance(request, EmbeddingRequest):
            return await embeddings.reply(http, request, model, deadline)
        wishes.check_choices(request, self._spec.max_choices)
        places = model.admission.enter(request.num_choices)  # before the prompt: images cost time
        try:
            work = await self._plan(http, request, model, adapter, deadline)
            return await self._reply(http, request, work, model, places)
        except BaseException:
            places.release()
            raise

    async def _reply(
        self, http: HttpRequest, request: ChatRequest | TextRequest, work: Work, model: ServedModel, places: Places
    ) -> Response:
        """The answer whole, or the stream of it, which then holds the places."""
        reply = Reply(request.model, chat=isinstance(request, ChatRequest), version=model.version)
        headers = {VERSION_HEADER: model.version} if model.version else {}
        deltas = flow.choice_deltas(model.engine, work.requests, work.deadline)
        calling = model.prompts.calling(request.calling)
        answers = [
            Answer(index, calling, thought_end=one.prompt.thought_end) for index, one in enumerate(work.requests)
        ]
        if not request.stream:
            with places:
                await flow.unless_gone(http, streams.collect(deltas, answers))
            return JSONResponse(reply.body(answers, replies.usage(answers, work.num_prompt_tokens)), headers=headers)
        events = streams.events(deltas, answers, reply, work.num_prompt_tokens if request.include_usage else None)
        # The first event is awaited here, so that what fails before it still gets an HTTP status of its own.
        first = await flow.unless_gone(http, anext(events))
        return streams.EventStream(first, events, places, headers)

    async def _plan(
        self,
        http: HttpRequest,
        request: ChatRequest | TextRequest,
        model: ServedModel,
        adapter: Adapter | None,
        deadline: float,
    ) -> Work:
        """Prompts and sampling of every choice. Raises ApiError for what this model cannot do, and not in time."""
        if request.json_schema is not None and not model.engine.can_constrain:
            asked = "response_format" if request.calling is None else "tool_choice"
            raise ApiError(
                f"{asked} is not supported by the engine of this model, which holds answers to no schema",
                param=asked,
                code="unsupported_parameter",
            )
        if isinstance(request, TextRequest) and request.is_of_ids:  # nothing to do that is worth a thread
            prompts = _prompts(request, model.prompts)
        else:
            reading = asyncio.to_thread(_prompts, request, model.prompts)
            prompts = await flow.unless_gone(http, flow.before(deadline, reading))
        unique, requests = uuid.uuid4().hex, list[Request]()
        for prompt in prompts:
            sampling = wishes.sampling(
                request,
                defaults=model.defaults,
                calling=model.prompts.calling(request.calling),
                num_prompt_tokens=len(prompt.ids),
                room=model.engine.max_model_len,
                max_new_tokens=self._spec.max_new_tokens,
                place="prompt" if isinstance(request, TextRequest) else "messages",
            )
            for choice in range(request.n):
                one = wishes.for_choice(sampling, choice)
                requests.append(Request(f"{unique}-{len(requests)}", prompt, one, adapter))
        return Work(tuple(requests), sum(len(prompt.ids) for prompt in prompts), deadline)

    def _max_body_bytes(self, kind: type[AnyRequest]) -> int:
        """Bytes of a body before it is read: with room for media, in base64, where a model takes them."""
        takes_media = kind is ChatRequest and any(model.takes_media for model in self._models.values())
        return self._spec.max_body_bytes + takes_media * _media_bytes(self._spec)

    def _find(self, http: HttpRequest, name: str) -> ServedModel:
        base = self._base(name)
        if not (gate.may_ask(http, name) or gate.may_ask(http, base)):
            raise model_not_allowed(name)
        if base not in self._models:
            raise unknown_model(name)
        return self._models[base].pick(http.headers.get(VERSION_HEADER))

    def _base(self, name: str) -> str:
        """The model of `MODEL:ADAPTER`; any other name is a model's own."""
        base, _, adapter = name.rpartition(":")
        return base if adapter and name not in self._models and base in self._spec.adapters else name

    async def _adapter(self, http: HttpRequest, name: str, deadline: float) -> Adapter | None:
        """The adapter that `MODEL:ADAPTER` asks for. Raises ApiError (404) for one that is not there.

        503 for one that is not copied by the deadline.
        """
        base = self._base(name)
        if base == name:
            return None
        found = self._adapters[base].find(name.removeprefix(f"{base}:"))
        return await flow.unless_gone(http, flow.before(deadline, found))


def _media_bytes(spec: ServeSpec) -> int:
    """What the media of one request take in base64."""
    return spec.max_media_bytes * 4 // 3 + 1024


def _prompts(request: ChatRequest | TextRequest, prompts: PromptBuilder) -> list[Prompt]:
    if isinstance(request, ChatRequest):
        return [prompts.chat(request.messages, request.calling)]
    return [prompts.text(prompt) for prompt in request.prompt]


async def _on_refused(_: HttpRequest, error: Exception) -> Response:
    return gate.error_response(streams.told(error))


def _may_go_elsewhere(error: Exception) -> bool:
    """Whether another version may give the answer: this one failed, has no place for it, or does not take it.

    What one refuses another may take: its template, tokenizer and context are its own.
    """
    return error.status in (400, 429) if isinstance(error, ApiError) else True


def _looks_like_the_clients_fault(error: Exception) -> bool:
    """Whether the counts of a version leave it out: a refusal, or a prompt that its engine never saw."""
    if isinstance(error, ApiError):
        return error.status == 400
    return isinstance(error, Refused) or not isinstance(error, ServeError)
