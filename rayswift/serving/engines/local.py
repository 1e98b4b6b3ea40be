"""The `local` engine: transformers on this replica's own device, with continuous batching in one thread.

Knows how a model folder becomes a running decode loop, and how asyncio callers get at what its thread generates.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from rayswift.config.job import MediaSpec, ModelSpec
from rayswift.errors import ConfigError, RaySwiftError, ServeError
from rayswift.models.loading import load_model, load_tokenizer
from rayswift.models.pooling import Pooling, read_pooling
from rayswift.models.processor import has_processor
from rayswift.models.quantized import decompress
from rayswift.models.quiet import quiet_progress
from rayswift.serving.engine import Delta, Embedding, EngineOptions, Prompt, Request, Sampling
from rayswift.serving.stopping import stop_ids

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rayswift.data.media.encoder import MediaEncoder
    from rayswift.serving.local.embedding import Passes
    from rayswift.serving.local.loop import DecodeLoop, Vocabulary

_log = logging.getLogger("rayswift.serving")
_UNBOUNDED_MODEL_LEN = 4096
"""The length of a model whose config names none."""
_MAX_FAILURES = 3
"""Failures in a row before the engine counts as broken; one alone may be a prompt's own fault."""


class Local:
    """An `Engine`: see the protocol."""

    can_constrain: ClassVar[bool] = False

    def __init__(self, folder: str, options: EngineOptions) -> None:
        if options.adapters:
            raise ConfigError(
                "serves no adapters beside a model", path="engine", value="local",
                fix="use engine vllm (make serve-env), or serve an export with the adapter merged",
            )  # fmt: skip
        self._folder, self._options = folder, options
        self._loop: DecodeLoop | None = None
        self._passes: Passes | None = None
        self._max_model_len = 0
        self._media_encoder: MediaEncoder | None = None

    @property
    def media_encoder(self) -> MediaEncoder | None:
        return self._media_encoder

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def embedding(self) -> Embedding | None:
        return None if self._passes is None else self._passes.encoder.embedding

    async def start(self) -> None:
        await _in_a_thread_that_ends(self._load)
        if self._passes is not None:  # proved while it was loaded
            _log.info("engine local is ready to embed: %s, %d tokens", self._folder, self._max_model_len)
            return
        warm_up = Request("warm-up", Prompt((0,)), Sampling(max_new_tokens=1, temperature=0))
        async for _ in self.generate(warm_up):
            pass
        _log.info("engine local is ready: %s, %d tokens", self._folder, self._max_model_len)

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Delta | RaySwiftError]()

        def emit(event: Delta | RaySwiftError) -> None:
            with suppress(RuntimeError):  # the loop was closed: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        decode_loop = self._started()
        ticket = decode_loop.submit(request, emit)
        try:
            while True:
                delta = _merged(await events.get(), events)
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            decode_loop.abort(ticket)

    async def embed(self, ids: Sequence[int], num_dims: int | None = None) -> np.ndarray:
        if self._passes is None:
            raise ServeError("the engine has no embedding model", path="engine", value="local")
        return await self._passes.vector(ids, num_dims)

    def check(self) -> None:
        works, fix = self._passes or self._started(), "restart the replica"
        if not works.is_alive:
            raise ServeError("the decode thread has ended", path="engine", value="local", fix=fix)
        if (failed := works.num_failures) >= _MAX_FAILURES:
            raise ServeError(f"failed {failed} times in a row", path="engine", value="local", fix=fix)

    async def close(self) -> None:
        if self._loop is not None:
            await asyncio.to_thread(self._loop.close)
        if self._passes is not None:
            await self._passes.close()

    def _started(self) -> DecodeLoop:
        if self._loop is None:
            raise ServeError("the engine was not started", path="engine", value="local", fix="await start() first")
        return self._loop

    def _load(self) -> None:
        if (pooling := read_pooling(self._folder)) is not None:
            self._open_encoder(pooling, _dtype(self._folder, self._options))
            return
        opened = open_folder(self._folder, self._options)
        self._loop, self._max_model_len, self._media_encoder = opened.loop, opened.max_model_len, opened.media_encoder
        self._loop.start()

    def _open_encoder(self, pooling: Pooling, dtype: torch.dtype | None) -> None:
        from rayswift.serving.local.embedding import Passes, open_encoder

        device, wanted = _device(self._options), self._options.max_model_len
        encoder = open_encoder(self._folder, pooling, dtype, device, wanted)
        self._passes, self._max_model_len = Passes(encoder, self._options.max_concurrency), encoder.max_tokens


async def _in_a_thread_that_ends(work: Callable[[], None]) -> None:
    """Run what loads a model.

    The threads that share a product belong to the one that asked for it. While another that once asked lives on, there
    are more of them than cores, and then OpenMP (libgomp) sends them to sleep after every product: on two cores a
    decode step took 1.7 times as long.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix="rayswift-load")
    try:
        await asyncio.get_running_loop().run_in_executor(executor, work)
    finally:
        executor.shutdown(wait=False)


@dataclass(frozen=True)
class Opened:
    """A decode loop that is not started, its model, and what that takes."""

    loop: DecodeLoop
    model: PreTrainedModel
    max_model_len: int
    media_encoder: MediaEncoder | None


def open_folder(folder: str, options: EngineOptions, trained: Mapping[str, torch.Tensor] | None = None) -> Opened:
    """The decode loop of a model folder as replicas have it.

    With `trained` weights in place of those of the folder, for what is not written down. Raises as `open_loop` does.
    """
    from rayswift.serving.local.packing import pack

    model = load_model(ModelSpec(path=folder), dtype=_dtype(folder, options))
    if trained is not None:
        model.load_state_dict(trained)
    if _device(options).type == "cpu":
        with quiet_progress():  # it tries the model, which unpacks a quantized one
            pack(model)
    decompress(model)
    return open_loop(model, folder, options)


def open_loop(model: PreTrainedModel, folder: str, options: EngineOptions) -> Opened:
    """The decode loop over a loaded model with the tokenizer and processor of `folder`; the model is moved in place.

    Raises ConfigError for a model whose answers from a cache are not its own.
    """
    from rayswift.serving.local.loop import DecodeLoop
    from rayswift.serving.local.proof import prove

    tokenizer = load_tokenizer(folder)
    # `to` of transformers is wrapped in a way that loses its signature
    model = cast("Any", model).to(_device(options)).eval()
    max_model_len = _model_len(model, options.max_model_len)
    encoder = _media_encoder(folder, options.media)
    prove(model, folder, max_model_len, encoder)
    vocabulary, num_axes = _vocabulary(model, tokenizer), encoder.num_axes if encoder else 0
    return Opened(DecodeLoop(model, vocabulary, options.max_concurrency, num_axes), model, max_model_len, encoder)


def _dtype(folder: str, options: EngineOptions) -> torch.dtype | None:
    """None: as stored."""
    import torch

    from rayswift.serving.local.precision import dtype_for_cpu

    if options.dtype != "auto":
        named: torch.dtype = getattr(torch, options.dtype)
        return named
    return dtype_for_cpu(folder) if _device(options).type == "cpu" else None


def _media_encoder(folder: str, bounds: MediaSpec) -> MediaEncoder | None:
    """None for a model of text, and, with a warning, where the processor cannot be built here."""
    from rayswift.training.media import load_encoder

    if not has_processor(folder):
        return None
    try:
        return load_encoder(folder, bounds)
    except ConfigError as error:
        _log.warning("%s is served with text alone, since its processor cannot be loaded: %s", folder, error)
        return None


def _merged(first: Delta | RaySwiftError, events: asyncio.Queue[Delta | RaySwiftError]) -> Delta:
    """The first event and all that already wait behind it as one delta, so that a slow reader gets fewer, larger ones.

    An error is raised; an error behind deltas is left for the next call.
    """
    if isinstance(first, RaySwiftError):
        raise first
    merged = first
    while not events.empty():
        event = events.get_nowait()
        if isinstance(event, RaySwiftError):
            events.put_nowait(event)  # the loop sends nothing after an error, so it stays the last one
            break
        merged = merged + event
    return merged


def _device(options: EngineOptions) -> torch.device:
    """Where the model goes. Raises ConfigError for a kind that this machine has none of."""
    import torch

    wanted = options.device
    if wanted == "cpu":
        return torch.device("cpu")
    current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if wanted != "auto" and (current is None or current.type != wanted):
        found = "none" if current is None else current.type
        raise ConfigError(f"is not on this machine (found: {found})", path="device", value=wanted, fix="use auto")
    if current is None:
        return torch.device("cpu")
    return torch.device(current.type, options.device_ids[0]) if options.device_ids else current


def _model_len(model: PreTrainedModel, wanted: int | None) -> int:
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    built_for = next((int(value) for name in names if (value := getattr(config, name, None))), None)
    if wanted is not None and built_for is not None and wanted > built_for:
        raise ConfigError(
            f"is more than the model was built for, {built_for}", path="max_model_len", value=wanted, fix="lower it"
        )
    return wanted or built_for or _UNBOUNDED_MODEL_LEN


def _vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    from rayswift.serving.local.loop import Vocabulary

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    generation = getattr(model.generation_config, "eos_token_id", None)
    special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return Vocabulary(decode, frozenset(stop_ids(model.config, tokenizer, generation)), special)
