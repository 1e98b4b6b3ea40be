"""The running batch: sequences of different lengths that join and leave between two decode steps.

Knows transformers' caches and the forward pass. Knows nothing of requests, sampling or text.
Shape legend: B rows (running sequences), H key/value heads, S tokens of the longest row, D head size, V vocabulary.

transformers' own continuous batching (5.17) has per-request temperature and top_p, but neither a seed nor greedy
decoding per request, and was four times slower than a plain loop at concurrency 1 on a CPU; hence this one.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

_FIRST_ROWS, _FIRST_COLUMNS = 4, 128


class Batch(Protocol):
    """Running sequences, numbered by row. Removing a row moves the last row into its place."""

    def join(self, cache: DynamicCache) -> None:
        """Add a prefilled sequence as the last row."""

    def leave(self, row: int) -> None:
        """Drop a sequence; the last row takes its number."""

    def decode(self, token_ids: list[int]) -> torch.Tensor:
        """Logits_BV, float32, after feeding each row its newest token."""


def open_batch(model: PreTrainedModel) -> Batch:
    """The batch that fits the model: one forward pass for all rows where every layer keeps all keys and values.

    Sliding-window and other state has no common shape for rows of different lengths; such a model is run row by row,
    which is slower. Neither is right for every model: `proof.py` finds out.
    """
    layers = _new_cache(model).layers
    plain = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
    return SlotBatch(model, len(layers)) if plain and "position_ids" in _parameters(model) else SoloBatch(model)


class Prefill:
    """A prompt on its way into the model, a chunk at a time so that running answers do not wait for a long one."""

    def __init__(self, model: PreTrainedModel, prompt_ids: tuple[int, ...], chunk_tokens: int | None) -> None:
        self._model, self._prompt_ids, self._done = model, prompt_ids, 0
        self._chunk_tokens = chunk_tokens or len(prompt_ids)
        self.cache = _new_cache(model)

    def advance(self) -> torch.Tensor | None:
        """Logits_V after the whole prompt, or None while there is more of it."""
        chunk = self._prompt_ids[self._done : self._done + self._chunk_tokens]
        ids_1T = torch.tensor([chunk], device=self._model.device)
        keep = keep_logits(self._model, 1)
        logits_1TV = self._model(input_ids=ids_1T, past_key_values=self.cache, use_cache=True, **keep).logits
        self._done += len(chunk)
        return None if self._done < len(self._prompt_ids) else logits_1TV[0, -1].float()


class SoloBatch:
    """One forward pass per row: right for every model that keeps all of its state in a `DynamicCache`.

    Not so mamba, mamba2, rwkv and recurrent_gemma (transformers 5.17), which ignore the cache they are given.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._caches = model, list[DynamicCache]()

    def join(self, cache: DynamicCache) -> None:
        self._caches.append(cache)

    def leave(self, row: int) -> None:
        self._caches[row] = self._caches[-1]
        self._caches.pop()

    def decode(self, token_ids: list[int]) -> torch.Tensor:
        assert len(token_ids) == len(self._caches), "one token per row"
        device = self._model.device
        rows_V = [
            self._model(input_ids=torch.tensor([[token]], device=device), past_key_values=cache, use_cache=True).logits[
                0, -1
            ]
            for token, cache in zip(token_ids, self._caches, strict=True)
        ]
        return torch.stack(rows_V).float()


class SlotBatch:
    """One forward pass for all rows over a cache with a slot per row.

    Row r holds its tokens in columns 0..lengths[r]-1. A shorter row's further columns are masked, and what lies there
    is zero, because the weight zero of a masked column does not take away a NaN that an earlier answer left there. So a
    row's result does not depend on its neighbours, nor on who had its slot before, beyond the rounding of a matmul.
    """

    def __init__(self, model: PreTrainedModel, num_layers: int) -> None:
        self._model, self._cache = model, _SlotCache(num_layers)

    def join(self, cache: DynamicCache) -> None:
        self._cache.append(cache)

    def leave(self, row: int) -> None:
        self._cache.remove(row)

    def decode(self, token_ids: list[int]) -> torch.Tensor:
        lengths, device = self._cache.lengths, self._model.device
        assert len(token_ids) == len(lengths), "one token per row"
        self._cache.begin_step(device)
        lengths_B1 = torch.tensor(lengths, device=device)[:, None]
        visible_BS = torch.arange(max(lengths) + 1, device=device) <= lengths_B1
        logits_B1V = self._model(
            input_ids=torch.tensor(token_ids, device=device)[:, None],
            position_ids=lengths_B1,
            attention_mask=visible_BS,
            past_key_values=self._cache,
            use_cache=True,
        ).logits
        self._cache.end_step()
        logits_BV: torch.Tensor = logits_B1V[:, -1].float()
        return logits_BV


class _SlotCache(Cache):
    """The cache of a SlotBatch. `lengths` is the truth about what its layers hold."""

    def __init__(self, num_layers: int) -> None:
        self.lengths: list[int] = []
        self.slots: list[_SlotLayer] = [_SlotLayer(self) for _ in range(num_layers)]
        self.columns_B = torch.empty(0, dtype=torch.long)
        super().__init__(layers=list(self.slots))

    def append(self, cache: DynamicCache) -> None:
        """Copy a prefilled sequence into the next free slot."""
        row = len(self.lengths)
        for slot, layer in zip(self.slots, cache.layers, strict=True):
            assert isinstance(layer, DynamicLayer), "only full attention layers share slots"
            keys_1HSD, values_1HSD = layer.keys, layer.values
            assert keys_1HSD is not None, "a joining sequence is prefilled"
            assert values_1HSD is not None, "a joining sequence is prefilled"
            slot.write(row, keys_1HSD, values_1HSD)
        self.lengths.append(cache.get_seq_length())

    def remove(self, row: int) -> None:
        """Free a slot by moving the last one into it."""
        last = len(self.lengths) - 1
        if row != last:
            for slot in self.slots:
                slot.move(last, row, self.lengths[last])
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        if not self.lengths:
            for slot in self.slots:
                slot.clear()  # idle: the memory that the longest answers took is not kept

    def begin_step(self, device: torch.device) -> None:
        """Note the column each row's next token goes to."""
        self.columns_B = torch.tensor(self.lengths, device=device)
        for slot in self.slots:
            slot.reserve(len(self.lengths), max(self.lengths) + 1)

    def end_step(self) -> None:
        """Count the tokens that the forward pass has added."""
        self.lengths = [length + 1 for length in self.lengths]


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows, H, columns, D], with room to grow so that a step copies one column only."""

    def __init__(self, owner: _SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owner = owner
        self._keys: torch.Tensor = torch.empty(0, 0, 0, 0)
        self._values: torch.Tensor = torch.empty(0, 0, 0, 0)

    def write(self, row: int, keys_1HSD: torch.Tensor, values_1HSD: torch.Tensor) -> None:
        """Fill a slot with a prefilled sequence, and its further columns with zeros."""
        if not self.is_initialized:
            self.lazy_initialization(keys_1HSD, values_1HSD)
        length = keys_1HSD.shape[2]
        self.reserve(row + 1, length)
        self._keys[row, :, :length] = keys_1HSD[0]
        self._values[row, :, :length] = values_1HSD[0]
        self._blank(row, length)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a slot's first `length` columns to another slot, and zeros behind them."""
        self._keys[target, :, :length] = self._keys[source, :, :length]
        self._values[target, :, :length] = self._values[source, :, :length]
        self._blank(target, length)

    def _blank(self, row: int, length: int) -> None:
        self._keys[row, :, length:] = 0
        self._values[row, :, length:] = 0

    def clear(self) -> None:
        """Give all memory back; the next `write` starts anew."""
        self._keys = self._values = torch.empty(0, 0, 0, 0)
        self.is_initialized = False

    def reserve(self, num_rows: int, num_columns: int) -> None:
        """Grow to at least this size, by doubling. Room that was never written is zero, hence finite."""
        rows, columns = self._keys.shape[0], self._keys.shape[2]
        if rows >= num_rows and columns >= num_columns:
            return
        new_rows, new_columns = _doubled(rows, num_rows), _doubled(columns, num_columns)
        grown = _grown(self._keys, new_rows, new_columns), _grown(self._values, new_rows, new_columns)
        self._keys, self._values = grown  # both or, out of memory, none: their sizes stay equal

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._keys = key_states.new_zeros(_FIRST_ROWS, key_states.shape[1], _FIRST_COLUMNS, key_states.shape[3])
        self._values = value_states.new_zeros(_FIRST_ROWS, value_states.shape[1], _FIRST_COLUMNS, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        columns_B, num_rows = self._owner.columns_B, key_states.shape[0]
        rows_B = torch.arange(num_rows, device=columns_B.device)
        self._keys[rows_B, :, columns_B] = key_states[:, :, 0]
        self._values[rows_B, :, columns_B] = value_states[:, :, 0]
        width = self.get_seq_length() + 1
        return self._keys[:num_rows, :, :width], self._values[:num_rows, :, :width]

    def get_seq_length(self) -> int:
        return max(self._owner.lengths, default=0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


def keep_logits(model: PreTrainedModel, count: int) -> dict[str, int]:
    """The argument that spares a forward pass all but the last `count` logits, where the model knows it."""
    return {"logits_to_keep": count} if "logits_to_keep" in _parameters(model) else {}


def _new_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


def _parameters(model: PreTrainedModel) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)


def _doubled(size: int, wanted: int) -> int:
    while size < wanted:
        size *= 2
    return size


def _grown(old: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
    new[: old.shape[0], :, : old.shape[2]] = old
    return new
