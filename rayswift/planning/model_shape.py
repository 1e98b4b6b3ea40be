"""ModelShape: the sizes of a model that memory and time depend on, read from its config and weight headers.

Knows the names that Hugging Face configs give these sizes. Reads no tensor data and loads no torch.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from rayswift.config.job import Part
from rayswift.planning.parts import part_of

_TOWERS: dict[str, Part] = {"vision_config": "vision", "audio_config": "audio"}
_ALIASES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_attention_heads", "n_head", "n_heads"),
    "vocab_size": ("vocab_size",),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
}
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_NUM_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"
_HEADS = ("lm_head.weight", "embed_out.weight")
_NO_LINEAR = re.compile(r"embed|wte|wpe|\.experts\.|(gate|router)\.weight$")  # fused experts are no linear layers


@dataclass(frozen=True)
class Linear:
    """One linear layer, by the name of its module."""

    name: str
    num_in: int
    num_out: int

    def is_named(self, target: str) -> bool:
        """Whether an adapter's target means this layer: its name, or how its name ends."""
        return self.name == target or self.name.endswith(f".{target}")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder model. `num_params` counts tied weights once; all are positive.

    `tied` says that the input embedding is the output head too. `active_params` are those a token passes through,
    None where it is all of them. `linears` are the layers an adapter can go on, None where only sizes are known.
    Of a mixture, `expert_params` are those of all experts that tokens are routed to, `expert_size` is one's inner size.
    `towers` says what the model takes beside text, `part_params` counts the parameters of each part.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    intermediate_size: int
    num_params: int
    head_dim: int | None = None
    tied: bool = False
    active_params: int | None = None
    linears: tuple[Linear, ...] | None = None
    num_experts: int = 1
    expert_params: int = 0
    expert_size: int | None = None
    towers: tuple[Part, ...] = ()
    part_params: Mapping[Part, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert min(self.hidden_size, self.num_layers, self.vocab_size, self.num_params) > 0, self
        assert (self.active_params or 1) <= self.num_params >= self.expert_params, self

    @property
    def attention_size(self) -> int:
        """The width of all query heads together; not always the hidden size."""
        return self.num_heads * (self.head_dim or max(1, self.hidden_size // self.num_heads))

    @property
    def matmul_params(self) -> int:
        """Parameters that a token is multiplied with: a lookup in an input embedding that is no head is no product."""
        active = self.active_params or self.num_params
        return active if self.tied else max(1, active - self.vocab_size * self.hidden_size)

    @property
    def experts_per_token(self) -> int:
        """How many of the experts a token passes through, as far as the counts of parameters tell."""
        unused = self.num_params - (self.active_params or self.num_params)
        return max(1, round(self.num_experts * (1 - unused / self.expert_params))) if self.expert_params else 1

    def frozen_params(self, parts: Sequence[Part]) -> int:
        """Parameters of these parts, as far as they were counted."""
        return sum(self.part_params.get(part, 0) for part in parts)

    def linear_layers(self) -> tuple[Linear, ...]:
        """The layers an adapter can go on, as stored or as a gated dense decoder of these sizes has them."""
        return self._dense_linears() if self.linears is None else self.linears

    def _dense_linears(self) -> tuple[Linear, ...]:
        hidden, inner, query = self.hidden_size, self.intermediate_size, self.attention_size
        key = query * self.num_kv_heads // self.num_heads
        block = {"self_attn.q_proj": (hidden, query), "self_attn.k_proj": (hidden, key),
                 "self_attn.v_proj": (hidden, key), "self_attn.o_proj": (query, hidden)}  # fmt: skip
        if self.active_params in (None, self.num_params):  # experts are fused
            up, down = (hidden, inner), (inner, hidden)
            block |= {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": down}
        layers = range(self.num_layers)
        return tuple(Linear(f"model.layers.{i}.{name}", *size) for i in layers for name, size in block.items())

    @property
    def params_per_block(self) -> int:
        """Parameters of one block, all blocks taken as equal."""
        return max(self.num_params - self.vocab_size * self.hidden_size, self.num_params // 2) // self.num_layers


def shape_from_config(config: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]] | None = None) -> ModelShape:
    """The shape a config describes. `stored` are the shapes of the weights, by name; without them it is an estimate."""
    nested = config.get("text_config")
    text = nested if isinstance(nested, Mapping) else config
    sizes = {name: _first(text, aliases) for name, aliases in _ALIASES.items()}
    hidden, heads = sizes["hidden_size"] or 1, sizes["num_heads"] or 1
    shape = ModelShape(
        architecture=str((config.get("architectures") or [config.get("model_type", "unknown")])[0]),
        hidden_size=hidden,
        num_layers=sizes["num_layers"] or 1,
        num_heads=heads,
        num_kv_heads=sizes["num_kv_heads"] or heads,
        vocab_size=sizes["vocab_size"] or 1,
        intermediate_size=sizes["intermediate_size"] or 4 * hidden,
        num_params=1,
        head_dim=_first(text, ("head_dim",)),
        tied=_is_tied(config, text, stored),
        num_experts=_first(text, _NUM_EXPERTS) or 1,
        expert_size=_first(text, ("moe_intermediate_size",)),
        towers=tuple(part for name, part in _TOWERS.items() if isinstance(config.get(name), Mapping)),
    )
    return _estimated(shape, text) if stored is None else _counted(shape, text, stored)


def shape_from_folder(folder: str | Path) -> ModelShape:
    """The shape of a local Hugging Face folder, its parameters counted in the safetensors headers.

    Only the files that transformers reads count: some folders hold the same weights in another layout, too. Raises
    FileNotFoundError without a config.json and ValueError when that is not JSON.
    """
    root = Path(folder)
    config = json.loads((root / "config.json").read_text(encoding="utf-8"))
    stored = {name: shape for file in _weight_files(root) for name, shape in read_header(file).items()}
    return shape_from_config(config, stored or None)


def read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a safetensors file, from its header alone.

    Format: 8 bytes little-endian header length, then JSON (https://huggingface.co/docs/safetensors).
    """
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def _weight_files(root: Path) -> list[Path]:
    if (root / _INDEX).is_file():
        index = json.loads((root / _INDEX).read_text(encoding="utf-8"))
        return [root / name for name in sorted(set(index["weight_map"].values()))]
    return [root / _WEIGHTS] if (root / _WEIGHTS).is_file() else []


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def _is_tied(config: Mapping[str, Any], text: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]] | None) -> bool:
    """As the config says; where it does not, as the weights show; else tied, the default of transformers."""
    said = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    if said is not None:
        return bool(said)
    return stored is None or not any(name.endswith(_HEADS) for name in stored)


def _used_share(text: Mapping[str, Any]) -> float:
    """The fraction of the experts that a token passes through; 1 without experts."""
    experts, used = _first(text, _NUM_EXPERTS) or 1, _first(text, _NUM_EXPERTS_PER_TOKEN)
    return min(1.0, (used or experts) / experts)


def _counted(shape: ModelShape, text: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]]) -> ModelShape:
    """The shape with what its weights show. A head stored beside the embedding it is tied to counts once."""
    own = {name: size for name, size in stored.items() if not (shape.tied and name.endswith(_HEADS))}
    experts = sum(prod(size) for name, size in own.items() if ".experts." in name)
    total = sum(map(prod, own.values()))
    linears = tuple(
        Linear(name.removesuffix(".weight"), size[1], size[0])
        for name, size in own.items()
        if name.endswith(".weight") and len(size) == 2 and not name.endswith(_HEADS) and not _NO_LINEAR.search(name)
    )
    active = total - round(experts * (1 - _used_share(text)))
    parts: dict[Part, int] = {}
    for name, size in own.items():
        parts[part_of(name)] = parts.get(part_of(name), 0) + prod(size)
    return replace(
        shape, num_params=total, active_params=active, expert_params=experts, linears=linears, part_params=parts
    )


def _estimated(shape: ModelShape, text: Mapping[str, Any]) -> ModelShape:
    """The shape with the parameters of a gated dense decoder of its sizes; experts multiply the feed-forward part."""
    hidden, layers = shape.hidden_size, shape.num_layers
    experts = shape.num_experts
    inner = (shape.expert_size or shape.intermediate_size) if experts > 1 else 0
    key_size = shape.attention_size * shape.num_kv_heads // shape.num_heads
    attention = 2 * hidden * (shape.attention_size + key_size)
    routed = layers * 3 * hidden * inner * experts
    dense = 0 if experts > 1 else layers * 3 * hidden * shape.intermediate_size
    embeddings = shape.vocab_size * hidden * (1 if shape.tied else 2)
    total = layers * (attention + 2 * hidden) + dense + routed + embeddings + hidden
    active = total - round(routed * (1 - _used_share(text)))
    return replace(shape, num_params=total, active_params=active, expert_params=routed)
