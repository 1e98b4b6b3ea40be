"""Where vLLM is asked about an export: as few GPUs as hold the weights, and no more memory than is free."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayswift.errors import ConfigError
from rayswift.serving.vllm.room import Room, is_lack, room_for, sizes_of

_GIB = 2**30
_EMPTY = (79 * _GIB, 80 * _GIB)


@pytest.mark.parametrize(
    ("gib", "heads", "free_of", "room"),
    [
        (15, (32, 8), [_EMPTY] * 8, Room((0,), 0.9)),
        (15, (32, 8), [(33 * _GIB, 80 * _GIB)], Room((0,), 0.4)),  # an endpoint holds the rest
        (15, (32, 8), [(8 * _GIB, 80 * _GIB), _EMPTY], Room((1,), 0.9)),
        (140, (64, 8), [_EMPTY] * 8, Room((0, 1, 2, 3), 0.9)),
        (140, (64, 8), [(9 * _GIB, 80 * _GIB), *[_EMPTY] * 4], Room((1, 2, 3, 4), 0.9)),
        (70, (40, 10), [_EMPTY] * 2, Room((0, 1), 0.9)),
        (70, (40, 1), [_EMPTY, (61 * _GIB, 80 * _GIB)], Room((0, 1), 0.75)),
    ],
)
def test_a_model_is_asked_on_as_few_gpus_as_hold_it(
    gib: int, heads: tuple[int, ...], free_of: list[tuple[int, int]], room: Room
) -> None:
    assert room_for(gib * _GIB, heads, free_of) == room


@pytest.mark.parametrize(
    ("gib", "heads", "free_of"),
    [
        (140, (64, 8), [_EMPTY]),
        (140, (7, 7), [_EMPTY] * 8),  # cannot be cut
        (140, (24, 6), [_EMPTY] * 4),  # two are too few, and four share no six heads
        (140, (), [_EMPTY] * 8),
        (1, (32, 8), [(_GIB // 2, 80 * _GIB)]),
        (1, (32, 8), []),
    ],
)
def test_what_fits_nowhere_is_a_lack_of_memory(
    gib: int, heads: tuple[int, ...], free_of: list[tuple[int, int]]
) -> None:
    with pytest.raises(
        ConfigError, match=rf"weights of {gib}\.0 GiB fit in no free GPU memory here \(free: "
    ) as caught:
        room_for(gib * _GIB, heads, free_of)
    assert is_lack(str(caught.value))


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of", True),
        ("ValueError: Free memory on device cuda:0 (8.1/79.2 GiB) on startup is less than desired GPU memory", True),
        ("ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`", True),
        ("ValueError: To serve at least one request (1.0 GiB KV cache is needed, which is larger than the available KV "
         "cache memory (0.5 GiB)", True),
        ("RuntimeError: Worker failed: no such kernel", False),
        ("ValueError: unknown argument gpu_memory_utilization", False),
    ],
)  # fmt: skip
def test_a_lack_of_memory_is_told_from_what_is_wrong_with_a_model(error: str, is_one: bool) -> None:
    assert is_lack(error) == is_one


def test_sizes_are_those_of_the_folder(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"model-{number}.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"num_attention_heads": 8}}))
    assert sizes_of(str(tmp_path)) == (200, (8,))
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 8, "num_key_value_heads": 2}))
    assert sizes_of(str(tmp_path)) == (200, (8, 2))
