"""Vectors of texts from a transformers model: texts that wait go through it together, pooled as their folder says.

Knows torch, one event loop, and how a batch is padded. How a folder says what its pooling is, is known by
`models/pooling.py`.
Shape legend: B texts, T positions, D numbers of a vector.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rayswift.config.job import ModelSpec
from rayswift.errors import ConfigError, ServeError
from rayswift.models.loading import load_model, load_tokenizer
from rayswift.models.pooling import Pooling
from rayswift.serving.engine import Embedding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BATCH_TOKENS = 16_384
"""Of a pass, padding included, where it has more than one text."""
_PROOF_TOKENS = (3, 7)
_BOUNDS = {torch.float32: 1e-4, torch.float64: 1e-4}
_HALF_BOUND = 0.05
_log = logging.getLogger("rayswift.serving")


class Encoder:
    """A model and its pooling, as a function of token ids. `max_tokens` is the longest text it can read."""

    def __init__(self, model: PreTrainedModel, pooling: Pooling, max_tokens: int) -> None:
        self._model: Any = model.eval()
        self.pooling, self.max_tokens = pooling, max_tokens
        size = int(model.config.get_text_config().hidden_size)
        self.embedding = Embedding(size, pooling.is_matryoshka, pooling.dimensions)

    @torch.inference_mode()
    def vectors(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """The pooled states [B, D] of texts in float32, not of length 1 yet."""
        lengths_B = torch.tensor([len(ids) for ids in texts], device=self._model.device)
        ids_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in texts], batch_first=True)
        ids_BT = ids_BT.to(self._model.device)
        mask_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < lengths_B[:, None]
        states_BTD = self._model(input_ids=ids_BT, attention_mask=mask_BT.long()).last_hidden_state.float()
        return _pooled(states_BTD, mask_BT, lengths_B, self.pooling).cpu().numpy()

    def prove(self, folder: str) -> None:
        """Raises ConfigError for a model that gives a text another vector where it stands beside a longer one."""
        texts = [[number % self._model.get_input_embeddings().num_embeddings for number in range(1, count + 1)]
                 for count in _PROOF_TOKENS if count <= self.max_tokens]  # fmt: skip
        together = self.vectors(texts)
        for text, vector in zip(texts, together, strict=True):
            alone = self.vectors([text])[0]
            apart = float(np.linalg.norm(alone - vector) / max(float(np.linalg.norm(alone)), 1e-20))
            if not apart <= _BOUNDS.get(self._model.dtype, _HALF_BOUND):  # NaN is wrong, too
                raise ConfigError(
                    f"is a {self._model.config.model_type} model, which gives a text another vector beside a longer "
                    f"one: they differ by {apart:.2g} of their size", path="model", value=folder,
                    fix="serve it with another engine",
                )  # fmt: skip


def open_encoder(folder: str, pooling: Pooling, dtype: torch.dtype | None, device: torch.device,
                 max_tokens: int | None) -> Encoder:  # fmt: skip
    """The proved encoder of an embedding model's folder. Raises ConfigError for what cannot be loaded."""
    from transformers import AutoModel

    # What BERT's own pooler would make is not used, and folders of embedding models often lack it.
    model: Any = load_model(ModelSpec(path=folder), dtype=dtype, auto=AutoModel, may_lack=("pooler.",))
    built_for = _max_tokens(model, folder, pooling)
    if max_tokens is not None and max_tokens > built_for:
        raise ConfigError(f"is more than the model reads, {built_for}", path="max_model_len", value=max_tokens,
                          fix="lower it")  # fmt: skip
    encoder = Encoder(model.to(device), pooling, max_tokens or built_for)
    encoder.prove(folder)
    return encoder


def finished(vector_D: np.ndarray, pooling: Pooling, num_dims: int | None) -> np.ndarray:
    """The first `num_dims` numbers of a pooled vector, then made of length 1 where the model is trained so."""
    cut = vector_D[:num_dims]
    return cut / max(float(np.linalg.norm(cut)), 1e-12) if pooling.normalize else cut


class Passes:
    """Runs an encoder in a thread: the texts that arrive during one pass go into the next together."""

    def __init__(self, encoder: Encoder, max_batch: int) -> None:
        self.encoder, self._max_batch = encoder, max_batch
        self._waiting: list[tuple[Sequence[int], asyncio.Future[np.ndarray]]] = []
        self._running: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rayswift-embed")
        """One for all passes: each that torch computes in has threads of its own, and all together want the cores."""
        self.num_failures = 0
        """Passes that failed in a row."""

    @property
    def is_alive(self) -> bool:
        """Always: what fails ends a pass and not the thread."""
        return True

    async def vector(self, ids: Sequence[int], num_dims: int | None) -> np.ndarray:
        """The finished vector of a text. Raises ServeError when its pass fails."""
        future: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._waiting.append((ids, future))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return finished(await future, self.encoder.pooling, num_dims)

    async def close(self) -> None:
        """Ends with the pass that runs; texts that wait are given up."""
        for _, future in self._waiting:
            future.cancel()
        if self._running is not None:
            await self._running
        self._thread.shutdown(wait=False)

    async def _run(self) -> None:
        while batch := self._next():
            try:
                texts = [ids for ids, _ in batch]
                found = await asyncio.get_running_loop().run_in_executor(self._thread, self.encoder.vectors, texts)
            except Exception as error:  # what torch raises when memory is short, say: told to each who waits for it
                self.num_failures += 1
                _log.error("a pass failed", exc_info=error)
                for _, future in batch:
                    if not future.done():
                        future.set_exception(ServeError("the pass of this text failed", path="engine", value="local"))
                continue
            self.num_failures = 0
            for (_, future), vector in zip(batch, found, strict=True):
                if not future.done():
                    future.set_result(vector)

    def _next(self) -> list[tuple[Sequence[int], asyncio.Future[np.ndarray]]]:
        """The texts of the next pass, those that nobody waits for any more left out."""
        self._waiting = [one for one in self._waiting if not one[1].done()]
        count, longest = 0, 0
        for ids, _ in self._waiting[: self._max_batch]:
            longest = max(longest, len(ids))
            if count and longest * (count + 1) > _BATCH_TOKENS:
                break
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch


def _pooled(states_BTD: torch.Tensor, mask_BT: torch.Tensor, lengths_B: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    if pooling.mode == "cls":
        return states_BTD[:, 0]
    if pooling.mode == "last":
        return states_BTD[torch.arange(len(lengths_B), device=lengths_B.device), lengths_B - 1]
    return (states_BTD * mask_BT[..., None]).sum(1) / lengths_B[:, None]


def _max_tokens(model: Any, folder: str, pooling: Pooling) -> int:
    """The least that pooling, tokenizer and config allow: of some models the last counts positions none can have."""
    config = model.config.get_text_config()
    allowed = (pooling.max_tokens, load_tokenizer(folder).model_max_length, config.max_position_embeddings)
    return int(min(filter(None, allowed)))
