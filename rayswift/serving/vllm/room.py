"""Which GPUs a model is proved on, and how much of their memory vLLM is given there. Knows sizes; imports no vLLM."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rayswift.errors import ConfigError
from rayswift.units import format_bytes

MOST = 0.9
"""Of a GPU's memory: what replicas take where nobody says how much."""
_BESIDE = 2**30
"""Of a GPU's free memory, what is left to the contexts that processes make on it before vLLM looks at it."""
_TO_WORK = 2**30
"""Bytes of a GPU that vLLM wants beside the weights: a step, graphs, and some cache."""
_OVER_WEIGHTS = 1.15
_LACK = re.compile(
    "out of memory|GPU memory|Free memory on device|No available memory for the cache|than the available KV cache"
)
"""What vLLM says where there is too little memory, and what is said here. (vllm 0.32)"""


@dataclass(frozen=True)
class Room:
    """Where a model fits: the indices of visible GPUs, which share each layer, and the part of their memory."""

    device_ids: tuple[int, ...]
    gpu_memory_fraction: float


def room_for(num_bytes: int, heads: Sequence[int], free_of: Sequence[tuple[int, int]]) -> Room:
    """As few of the emptiest GPUs as hold weights of `num_bytes`; `free_of` has the free and all bytes of each.

    Layers are cut in 1, 2, 4 ... parts, as all numbers of `heads` allow: a part has whole ones, or several parts share
    one. Raises ConfigError where it fits on none.
    """
    emptiest = sorted(range(len(free_of)), key=lambda number: -free_of[number][0])
    parts = 1
    while parts <= len(free_of):
        devices = tuple(sorted(emptiest[:parts]))
        fraction = min(MOST, *((free_of[number][0] - _BESIDE) / free_of[number][1] for number in devices))
        room = min(fraction * free_of[number][1] for number in devices)
        if _divides(parts, heads) and room >= _OVER_WEIGHTS * num_bytes / parts + _TO_WORK:
            return Room(devices, int(fraction * 1000) / 1000)  # never more than there is
        parts *= 2
    free = ", ".join(format_bytes(free) for free, _ in free_of) or "none"
    raise ConfigError(f"weights of {format_bytes(num_bytes)} fit in no free GPU memory here (free: {free})",
                      path="export", fix="free some, or use more GPUs")  # fmt: skip


def is_lack(error: str) -> bool:
    """Whether an error says that there is too little memory, of which the model is innocent."""
    return _LACK.search(error) is not None


def sizes_of(folder: str) -> tuple[int, tuple[int, ...]]:
    """The bytes of a folder's weights, and the numbers of heads that its layers are cut by: query heads first."""
    num_bytes = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)
    found = (text.get("num_attention_heads"), text.get("num_key_value_heads"))
    return num_bytes, tuple(number for number in found if isinstance(number, int))


def _divides(parts: int, heads: Sequence[int]) -> bool:
    if not heads:
        return parts == 1
    queries, *others = heads
    return queries % parts == 0 and all(number % parts == 0 or parts % number == 0 for number in others)
