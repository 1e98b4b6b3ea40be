"""ModelShape: the sizes of a model that memory and time depend on, read from its config and weight headers.

Knows the names that Hugging Face configs give these sizes. Reads no tensor data and loads no torch.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

_ALIASES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_attention_heads", "n_head", "n_heads"),
    "vocab_size": ("vocab_size",),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder model. `num_params` counts tied weights once; all are positive."""

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    intermediate_size: int
    num_params: int

    def __post_init__(self) -> None:
        assert min(self.hidden_size, self.num_layers, self.vocab_size, self.num_params) > 0, self

    @property
    def params_per_block(self) -> int:
        """Parameters of one block, all blocks taken as equal."""
        return max(self.num_params - self.vocab_size * self.hidden_size, self.num_params // 2) // self.num_layers


def shape_from_config(config: Mapping[str, Any], num_params: int | None = None) -> ModelShape:
    """The shape a config describes. `num_params` comes from the weights where they are known, else a dense estimate."""
    text = config.get("text_config") or config
    sizes = {name: _first(text, aliases) for name, aliases in _ALIASES.items()}
    hidden = sizes["hidden_size"] or 1
    inner = sizes["intermediate_size"] or 4 * hidden
    heads = sizes["num_heads"] or 1
    layers = sizes["num_layers"] or 1
    vocab = sizes["vocab_size"] or 1
    kv_heads = sizes["num_kv_heads"] or heads
    return ModelShape(
        architecture=str((config.get("architectures") or [config.get("model_type", "unknown")])[0]),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        vocab_size=vocab,
        intermediate_size=inner,
        num_params=num_params or _dense_params(text, hidden, inner, layers, vocab, heads, kv_heads),
    )


def shape_from_folder(folder: str | Path) -> ModelShape:
    """The shape of a local Hugging Face folder, its parameters counted in the safetensors headers.

    Raises FileNotFoundError without a config.json and ValueError when that is not JSON.
    """
    root = Path(folder)
    config = json.loads((root / "config.json").read_text(encoding="utf-8"))
    return shape_from_config(config, sum(map(count_params, sorted(root.glob("*.safetensors")))) or None)


def count_params(file: Path) -> int:
    """The number of elements in a safetensors file, from its header.

    Format: 8 bytes little-endian header length, then JSON (https://huggingface.co/docs/safetensors).
    """
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def _dense_params(
    config: Mapping[str, Any], hidden: int, inner: int, layers: int, vocab: int, heads: int, kv_heads: int
) -> int:
    """Parameters of a gated dense decoder of these sizes; experts multiply the feed-forward part."""
    head_dim = config.get("head_dim") or hidden // heads
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    experts = _first(config, ("num_experts", "num_local_experts", "n_routed_experts")) or 1
    expert_inner = config.get("moe_intermediate_size") or inner
    feed_forward = 3 * hidden * (expert_inner * experts if experts > 1 else inner)
    embeddings = vocab * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return int(layers * (attention + feed_forward + 2 * hidden) + embeddings + hidden)
