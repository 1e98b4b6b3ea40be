"""What the endpoint asks of an engine: token ids in, a stream of text deltas or a vector out. And a fake one for tests.

Knows no model, no HTTP and no Ray. The protocol is that of vLLM's AsyncLLM: `generate` is an async generator per
answer, closing it aborts the answer, and how many run in one batch is the engine's own business.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from rayswift.config.job import MediaSpec
from rayswift.data.types import Features
from rayswift.errors import ServeError

if TYPE_CHECKING:
    from rayswift.data.media.encoder import MediaEncoder

FinishReason = Literal["stop", "length"]
INCOMPLETE = "\ufffd"
"""What decoders write for bytes that are not a character (yet)."""
CONTEXT_STEP = 256
"""A context that was fitted into memory is a multiple of this: what is free differs by a little from start to start."""


class Refused(ServeError):
    """This one request cannot be answered, for a reason that its client may know; the engine is well."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when to stop. `temperature` 0 is greedy; `stop` strings are not returned.

    Penalties change logits before anything else: `repetition_penalty` those of all tokens so far, the prompt's
    included, the other two those of the answer's; `top_k` below 1 keeps all.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    """How many alternatives are reported beside each chosen token; None reports nothing."""
    json_schema: str | None = None
    """The JSON Schema, as text, that the answer keeps to; only for an engine that `can_constrain`."""
    grammar: str | None = None
    """The Lark grammar, as llguidance reads it, that it keeps to instead; only for such an engine."""


@dataclass(frozen=True)
class Prompt:
    """What a model is to continue. `media` fill the placeholders among `ids`, in order.

    `rope_AT` are positions on the axes of a model that has several; None stands for plain ones on each.
    """

    ids: tuple[int, ...]
    media: tuple[Features, ...] = field(default=(), compare=False)
    rope_AT: np.ndarray | None = field(default=None, compare=False)
    thought_end: str | None = field(default=None, compare=False)
    """The mark that ends a thought which was begun for the answer, where the answer's text will have it."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter by its name and its folder, which lies below the adapters of the model it is asked for with."""

    name: str
    folder: str


@dataclass(frozen=True)
class Request:
    """One answer to generate. Invariant: the prompt is not empty and leaves room for `sampling.max_new_tokens`."""

    request_id: str
    prompt: Prompt
    sampling: Sampling
    adapter: Adapter | None = None
    """What answers beside the model; only for an engine started with `EngineOptions.adapters`."""


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token with its log-probability before temperature, and the likeliest (text, log-probability) pairs.

    Texts are what a token adds to the answer, the space before a word included; INCOMPLETE is that of a part of a
    character, whose last part has all of it. A special token's is its name.
    """

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()
    id: int = -1
    is_special: bool = False
    """Whether it is left out of the answer's text."""

    @property
    def num_chars(self) -> int:
        """Characters that it adds to the answer's text."""
        return 0 if self.is_special or self.token == INCOMPLETE else len(self.token)


@dataclass(frozen=True)
class Delta:
    """What was generated since the last delta. `text` never ends inside a character; the last delta has the reason.

    `num_tokens` counts the new tokens, an end-of-turn token included, and not only those whose text is out already.
    """

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()

    def __add__(self, later: Delta) -> Delta:
        """This delta and the one that follows it as one."""
        return Delta(
            self.text + later.text,
            self.num_tokens + later.num_tokens,
            later.finish_reason,
            self.logprobs + later.logprobs,
        )


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is built with. `dtype` and `device` may be `auto`; `max_model_len` None is the model's own.

    `media` are the bounds of the images and sounds that it is shown.
    """

    max_concurrency: int = 16
    max_model_len: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    media: MediaSpec = field(default_factory=MediaSpec)
    adapters: bool = False
    """Whether requests may name a LoRA adapter."""
    max_adapters: int = 4
    """Most adapters in one batch."""
    max_adapter_rank: int = 64
    tensor_parallel: int = 1
    """Accelerators of one node that share each layer."""
    device_ids: tuple[int, ...] = ()
    """Which of the visible accelerators; none named are the first ones."""
    gpu_memory_fraction: float = 0.9
    """Of an accelerator's memory, for weights and cache."""
    kv_cache_bytes: int = 2 * 2**30
    """Cache of keys and values on a CPU."""


@dataclass(frozen=True)
class Embedding:
    """What the vectors of an embedding model are like: `num_dims` numbers, or fewer where it is matryoshka."""

    num_dims: int
    is_matryoshka: bool = False
    cuts: tuple[int, ...] = ()
    """The lengths that a vector may be cut to; none named are all up to the whole one's."""

    def admits(self, num_dims: int | None) -> bool:
        """Whether a request may ask for so many numbers; None asks for all."""
        if num_dims in (None, self.num_dims):
            return True
        return self.is_matryoshka and (num_dims in self.cuts if self.cuts else 0 < (num_dims or 0) < self.num_dims)


class Engine(Protocol):
    """One loaded model. Made as `Engine(folder, options)`; nothing is loaded before `start`."""

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its answer together. Valid after `start`."""

    @property
    def media_encoder(self) -> MediaEncoder | None:
        """What makes features of images and sounds; None for an engine that is given text only. After `start`."""

    @property
    def can_constrain(self) -> bool:
        """Whether it keeps an answer to a JSON Schema or a grammar."""

    @property
    def embedding(self) -> Embedding | None:
        """What its vectors are like; None for a model that generates. It does one or the other. Valid after `start`."""

    async def start(self) -> None:
        """Load the model and have it answer once. Raises ConfigError or ServeError; once it returns, it is ready."""

    def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """The deltas of one answer. Closing the generator frees its place at once.

        Raises ServeError on failure, Refused for a request that this model cannot take.
        """

    async def embed(self, ids: Sequence[int], num_dims: int | None = None) -> np.ndarray:
        """The vector [num_dims] of a text in float32; `num_dims` is one that `embedding` admits, None the whole one's.

        Cancelling it frees its place. Raises as `generate` does.
        """

    def check(self) -> None:
        """Raises ServeError when the engine cannot answer any more."""

    async def close(self) -> None:
        """Stop what runs and free what is held. May be called twice."""


@dataclass
class FakeEngine:
    """Answers every prompt with the same pieces, one token each, and counts who is running. `gate` holds it back.

    With an `embedding` it gives a text the vector of its ids, ones behind them.
    """

    pieces: Sequence[str] = ("Hello", ", ", "wörld", "!")
    max_model_len: int = 64
    gate: asyncio.Event | None = None
    failure: str | None = None
    media_encoder: MediaEncoder | None = None
    can_constrain: bool = False
    embedding: Embedding | None = None
    running: int = 0
    seen: list[Request] = field(default_factory=list)

    async def start(self) -> None:
        return None

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        self.seen.append(request)
        self.running += 1
        try:
            pieces = self.pieces[: request.sampling.max_new_tokens]
            for number, piece in enumerate(pieces, start=1):
                if self.gate is not None and number > 1:
                    await self.gate.wait()
                if self.failure is not None:
                    raise ServeError(self.failure)
                await asyncio.sleep(0)
                reason: FinishReason = "length" if len(pieces) < len(self.pieces) else "stop"
                yield Delta(piece, 1, reason if number == len(pieces) else None, self._logprobs(request, piece))
        finally:
            self.running -= 1

    async def embed(self, ids: Sequence[int], num_dims: int | None = None) -> np.ndarray:
        assert self.embedding is not None
        self.running += 1
        try:
            await (asyncio.sleep(0) if self.gate is None else self.gate.wait())
            if self.failure is not None:
                raise ServeError(self.failure)
            whole = [*ids, *[1] * self.embedding.num_dims][: num_dims or self.embedding.num_dims]
            return np.array(whole, dtype=np.float32)
        finally:
            self.running -= 1

    def check(self) -> None:
        if self.failure is not None:
            raise ServeError(self.failure)

    async def close(self) -> None:
        return None

    @staticmethod
    def _logprobs(request: Request, piece: str) -> tuple[TokenLogprob, ...]:
        wanted = request.sampling.logprobs
        if wanted is None:
            return ()
        return (TokenLogprob(piece, -0.5, ((piece, -0.5), ("other", -1.5))[:wanted]),)
