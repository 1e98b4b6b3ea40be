"""The cache of several sequences of different lengths: a slot per row, with room to grow.

Knows transformers' cache protocol. Knows no model, and not why rows come and go.
Shape legend: B rows, H key/value heads, S tokens of the longest row, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

_FIRST_ROWS, _FIRST_COLUMNS = 4, 128


class SlotCache(Cache):
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

    def __init__(self, owner: SlotCache) -> None:
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


def _doubled(size: int, wanted: int) -> int:
    while size < wanted:
        size *= 2
    return size


def _grown(old: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
    new[: old.shape[0], :, : old.shape[2]] = old
    return new
