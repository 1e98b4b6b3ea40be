"""The running batch: sequences of different lengths that join and leave between two decode steps.

Knows the forward pass; the cache that rows share is in `slots.py`. Knows nothing of requests, sampling or text.
Shape legend: B rows (running sequences), T tokens of a prompt, S of the longest row, A rope axes, V vocabulary.

transformers' own continuous batching (5.17) has per-request temperature and top_p, but neither a seed nor greedy
decoding per request, and was four times slower than a plain loop at concurrency 1 on a CPU; hence this one.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rayswift.data.media.features import model_features
from rayswift.serving.engine import Prompt
from rayswift.serving.local.slots import SlotCache


class Batch(Protocol):
    """Running sequences, numbered by row. Removing a row moves the last row into its place."""

    def join(self, cache: DynamicCache, shift: int = 0) -> None:
        """Add a prefilled sequence as the last row. `shift`: see `Prefill`."""

    def leave(self, row: int) -> None:
        """Drop a sequence; the last row takes its number."""

    def decode(self, token_ids: list[int]) -> torch.Tensor:
        """Logits_BV, float32, after feeding each row its newest token."""


def open_batch(model: PreTrainedModel, num_axes: int = 0) -> Batch:
    """The batch that fits the model: one forward pass for all rows where every layer keeps all keys and values.

    `num_axes`: those of its rope positions, 0 for a model of plain ones.

    Sliding-window and other state has no common shape for rows of different lengths; such a model is run row by row,
    which is slower. Neither is right for every model: `proof.py` finds out.
    """
    layers = _new_cache(model).layers
    plain = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
    if plain and "position_ids" in _parameters(model):
        return SlotBatch(model, len(layers), num_axes)
    return SoloBatch(model, num_axes)


class Prefill:
    """A prompt on its way into the model, a chunk at a time so that running answers do not wait for a long one.

    One with media is read at once: the model wants the features together with all the places that they fill.
    `shift` is what is added to the number of a later token for its position on a rope axis: an image of many tokens
    takes fewer positions than it has tokens.
    """

    def __init__(
        self, model: PreTrainedModel, prompt: Prompt, chunk_tokens: int | None = None, num_axes: int = 0
    ) -> None:
        self._model, self._prompt, self._done = model, prompt, 0
        self._length = len(prompt.ids)
        self._chunk_tokens = self._length if prompt.media or not chunk_tokens else chunk_tokens
        self._rope_AT = prompt.rope_AT
        if num_axes and self._rope_AT is None:
            self._rope_AT = np.tile(np.arange(self._length), (num_axes, 1))
        self.shift = 0 if self._rope_AT is None else int(self._rope_AT.max(initial=-1)) + 1 - self._length
        self.cache = _new_cache(model)

    def advance(self) -> torch.Tensor | None:
        """Logits_V after the whole prompt, or None while there is more of it."""
        stop = min(self._done + self._chunk_tokens, self._length)
        inputs = self.inputs(slice(self._done, stop))
        keep = keep_logits(self._model, 1)
        logits_1TV = self._model(**inputs, past_key_values=self.cache, use_cache=True, **keep).logits
        self._done = stop
        return None if stop < self._length else logits_1TV[0, -1].float()

    def inputs(self, chunk: slice) -> dict[str, torch.Tensor]:
        """What the model is given of a part of the prompt, on its device; the features all at once."""
        device = self._model.device
        inputs = {"input_ids": torch.tensor([self._prompt.ids[chunk]], device=device)}
        if self._rope_AT is not None:
            plain_T = np.arange(self._length)
            inputs["position_ids"] = torch.from_numpy(np.stack([plain_T, *self._rope_AT])[:, None, chunk]).to(device)
        for name, value in model_features(self._prompt.media).items():
            inputs[name] = value.to(device, self._model.dtype if value.is_floating_point() else None)
        return inputs


class SoloBatch:
    """One forward pass per row: right for every model that keeps all of its state in a `DynamicCache`.

    Not so mamba, mamba2, rwkv and recurrent_gemma (transformers 5.17), which ignore the cache they are given.
    """

    def __init__(self, model: PreTrainedModel, num_axes: int = 0) -> None:
        self._model, self._num_axes = model, num_axes
        self._caches, self._shifts = list[DynamicCache](), list[int]()

    def join(self, cache: DynamicCache, shift: int = 0) -> None:
        self._caches.append(cache)
        self._shifts.append(shift)

    def leave(self, row: int) -> None:
        self._caches[row], self._shifts[row] = self._caches[-1], self._shifts[-1]
        self._caches.pop()
        self._shifts.pop()

    def decode(self, token_ids: list[int]) -> torch.Tensor:
        assert len(token_ids) == len(self._caches), "one token per row"
        return torch.stack([self._decoded(row, token) for row, token in enumerate(token_ids)]).float()

    def _decoded(self, row: int, token: int) -> torch.Tensor:
        device, cache = self._model.device, self._caches[row]
        given: dict[str, Any] = {"input_ids": torch.tensor([[token]], device=device)}
        if self._num_axes:
            given["position_ids"] = _positions([cache.get_seq_length()], [self._shifts[row]], self._num_axes, device)
        logits_V: torch.Tensor = self._model(**given, past_key_values=cache, use_cache=True).logits[0, -1]
        return logits_V


def _positions(lengths: list[int], shifts: list[int], num_axes: int, device: torch.device) -> torch.Tensor:
    """Of each row's newest token, [B, 1]; for several rope axes [1 + A, B, 1], of which the first is the plain one."""
    lengths_B1 = torch.tensor(lengths, device=device)[:, None]
    if not num_axes:
        return lengths_B1
    axis_B1 = lengths_B1 + torch.tensor(shifts, device=device)[:, None]
    return torch.stack([lengths_B1, *[axis_B1] * num_axes])


class SlotBatch:
    """One forward pass for all rows over a cache with a slot per row.

    Row r holds its tokens in columns 0..lengths[r]-1. A shorter row's further columns are masked, and what lies there
    is zero, because the weight zero of a masked column does not take away a NaN that an earlier answer left there. So a
    row's result does not depend on its neighbours, nor on who had its slot before, beyond the rounding of a matmul.
    """

    def __init__(self, model: PreTrainedModel, num_layers: int, num_axes: int = 0) -> None:
        self._model, self._cache, self._num_axes = model, SlotCache(num_layers), num_axes
        self._shifts: list[int] = []

    def join(self, cache: DynamicCache, shift: int = 0) -> None:
        self._cache.append(cache)
        self._shifts.append(shift)

    def leave(self, row: int) -> None:
        self._cache.remove(row)
        self._shifts[row] = self._shifts[-1]
        self._shifts.pop()

    def decode(self, token_ids: list[int]) -> torch.Tensor:
        lengths, device = self._cache.lengths, self._model.device
        assert len(token_ids) == len(lengths), "one token per row"
        self._cache.begin_step(device)
        columns_S = torch.arange(max(lengths) + 1, device=device)
        visible_BS = columns_S <= torch.tensor(lengths, device=device)[:, None]
        logits_B1V = self._model(
            input_ids=torch.tensor(token_ids, device=device)[:, None],
            position_ids=_positions(lengths, self._shifts, self._num_axes, device),
            attention_mask=visible_BS,
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        self._cache.end_step()
        logits_BV: torch.Tensor = logits_B1V[:, -1].float()
        return logits_BV


def keep_logits(model: PreTrainedModel, count: int) -> dict[str, int]:
    """The argument that spares a forward pass all but the last `count` logits, where the model knows it."""
    return {"logits_to_keep": count} if "logits_to_keep" in _parameters(model) else {}


def _new_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


def _parameters(model: PreTrainedModel) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)
