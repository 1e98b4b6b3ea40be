"""Sizes in the field's words to the fields of a transformers config, for every architecture.

Knows that `num_hidden_layers` is `n_layer` in gpt2 and `num_layers` in gpt_neo, and which other fields follow from a
size. Does not know weights, files or tokenizers.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rayswift.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OPTIONS = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "model_dim", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"),
    "max_length": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "context_length"),
    "vocab_size": ("vocab_size",),
    "tie_embeddings": ("tie_word_embeddings",),
}
"""What `rayswift model init` calls a size, and what configs call it."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes asked for; None keeps what the architecture, or the model it is made like, has."""

    layers: int | None = None
    hidden_size: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    intermediate_size: int | None = None
    max_length: int | None = None
    vocab_size: int | None = None
    tie_embeddings: bool | None = None

    def asked(self) -> dict[str, int]:
        """The sizes that are not None."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


def option(name: str) -> str:
    """`--kv-heads` for `kv_heads`."""
    return "--" + name.replace("_", "-")


def config_class(arch: str) -> type[PretrainedConfig]:
    """The config class of a text architecture. ConfigError with a suggestion for any other name."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    if arch not in known:
        close = difflib.get_close_matches(arch, known, n=1)
        raise ConfigError(
            "is not an architecture that transformers has a causal language model for",
            path="--arch",
            value=arch,
            fix=f"did you mean {close[0]}?" if close else f"use one of the {len(known)}, such as qwen3, llama or gpt2",
        )
    found = CONFIG_MAPPING[arch]
    if field_of(found, "hidden_size") is None or field_of(found, "layers") is None:
        text = f"{arch}_text"
        raise ConfigError(
            "is made of several models, of which this command initializes none",
            path="--arch",
            value=arch,
            fix=f"use {text}" if text in known else "use a text architecture, such as qwen3 or llama",
        )
    assert isinstance(found, type)
    return found


def field_of(config: type[PretrainedConfig], size: str) -> str | None:
    """What this config class calls a size of `OPTIONS`; None if it has no such field."""
    fields = {field.name for field in dataclasses.fields(config)}
    renamed = config.attribute_map
    return next((renamed.get(n, n) for n in OPTIONS[size] if n in fields or n in renamed), None)


def build_config(
    arch: str, sizes: Sizes, *, like: Mapping[str, Any] | None = None, extra: Mapping[str, Any] | None = None
) -> PretrainedConfig:
    """The config of `arch` with these sizes; `like` is another config of it to start from, `extra` are raw fields.

    Raises ConfigError for an unknown architecture, for sizes that do not agree with each other, for a size the
    architecture does not have and for a config that transformers refuses.
    """
    cls = config_class(arch)
    _check_positive(sizes)
    # The ids of special tokens belong to the tokenizer; a class's default ids may lie outside this vocabulary.
    fields = dict(like or {}) | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    _check_heads(cls, sizes, fields)
    fields = _resized(cls, fields, sizes) | _written(cls, sizes)
    fields |= _followers(cls, fields, sizes, fresh=like is None)
    fields |= dict(extra or {})
    try:
        return cls(**fields)
    except Exception as error:  # strict configs raise their own classes: whatever it is, the config is what is wrong
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"cannot be built with these sizes: {reason[:300]}", path="--arch", value=arch, fix="change the sizes"
        ) from error


def _check_positive(sizes: Sizes) -> None:
    for name, value in sizes.asked().items():
        if not isinstance(value, bool) and value < 1:
            raise ConfigError("is not positive", path=option(name), value=value, fix="use 1 or more")


def _check_heads(cls: type[PretrainedConfig], sizes: Sizes, fields: Mapping[str, Any]) -> None:
    """Raises unless heads share the hidden size evenly and query heads share key/value heads evenly."""
    hidden, heads, kv_heads = (_value(cls, sizes, fields, name) for name in ("hidden_size", "heads", "kv_heads"))
    if hidden and heads and hidden % heads and (sizes.hidden_size or sizes.heads):
        raise ConfigError(
            f"does not divide --hidden-size={hidden}", path="--heads", value=heads, fix=f"use {_divisors(hidden)}"
        )
    if sizes.kv_heads is None or not heads:
        return
    if heads % sizes.kv_heads:
        raise ConfigError(
            f"does not divide --heads={heads}", path="--kv-heads", value=sizes.kv_heads, fix=f"use {_divisors(heads)}"
        )
    if kv_heads != heads and field_of(cls, "kv_heads") is None:
        raise ConfigError(
            f"is not possible: {cls.model_type} has no grouped key/value heads",
            path="--kv-heads",
            value=sizes.kv_heads,
            fix="leave it out",
        )


def _value(cls: type[PretrainedConfig], sizes: Sizes, fields: Mapping[str, Any], name: str) -> int | None:
    """The size as asked, else as `fields` has it, else None."""
    asked = getattr(sizes, name)
    found = asked if asked is not None else fields.get(field_of(cls, name) or "")
    return found if isinstance(found, int) else None


def _divisors(number: int) -> str:
    found = [d for d in range(1, min(number, 64) + 1) if number % d == 0]
    return ", ".join(str(d) for d in found[:-1]) + f" or {found[-1]}" if len(found) > 1 else "1"


def _written(cls: type[PretrainedConfig], sizes: Sizes) -> dict[str, Any]:
    """The sizes under the names of the config class. ConfigError for one it does not have."""
    written: dict[str, Any] = {}
    for name, value in sizes.asked().items():
        field = field_of(cls, name)
        if field is not None:
            written[field] = value
        elif name not in (
            "kv_heads",
            "max_length",
            "tie_embeddings",
        ):  # without a field these are no limit or no choice
            raise ConfigError(
                f"cannot be set: the config of {cls.model_type} has no such size", path=option(name), value=value,
                fix="leave it out",
            )  # fmt: skip
    return written


def _resized(cls: type[PretrainedConfig], fields: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """`fields` without what only fits the old number of layers: lists with one item per layer are cut or left out."""
    old = fields.get(field_of(cls, "layers") or "")
    if sizes.layers is None or not isinstance(old, int) or old == sizes.layers:
        return fields
    cut = {
        k: v[: sizes.layers] for k, v in fields.items() if isinstance(v, list) and len(v) == old and sizes.layers < old
    }
    grown = {k for k, v in fields.items() if isinstance(v, list) and len(v) == old and sizes.layers > old}
    return {k: cut.get(k, v) for k, v in fields.items() if k not in grown}


def _followers(cls: type[PretrainedConfig], fields: Mapping[str, Any], sizes: Sizes, *, fresh: bool) -> dict[str, Any]:
    """Fields that follow from the sizes and whose defaults are those of the architecture's big model."""
    known = {field.name for field in dataclasses.fields(cls)}
    hidden, heads, kv_heads = (_value(cls, sizes, fields, name) for name in ("hidden_size", "heads", "kv_heads"))
    follow: dict[str, Any] = {}
    if fresh or sizes.hidden_size or sizes.heads:
        if "head_dim" in known and hidden and heads:
            follow["head_dim"] = hidden // heads
        if "rotary_dim" in known and hidden and heads:
            follow["rotary_dim"] = hidden // heads
        inner = field_of(cls, "intermediate_size")
        if inner and hidden and sizes.intermediate_size is None:
            follow[inner] = default_intermediate_size(hidden)
    if kv_heads is None and heads and fresh and (field := field_of(cls, "kv_heads")):
        follow[field] = heads
    if (
        "new_decoder_architecture" in known and sizes.kv_heads and heads
    ):  # falcon counts key/value heads in its new form
        follow |= {"multi_query": kv_heads == 1, "new_decoder_architecture": kv_heads not in (1, heads)}
    if "moe_intermediate_size" in known and fresh:
        follow["moe_intermediate_size"] = follow.get("intermediate_size") or sizes.intermediate_size
    if "attention_types" in known and fresh and sizes.layers:  # gpt_neo lists its layers as a pattern and a count
        follow["attention_types"] = [[["global"], sizes.layers]]
    return follow


def default_intermediate_size(hidden_size: int) -> int:
    """8/3 of the hidden size, the width of Llama's gated MLP, rounded up to a multiple of 64."""
    return -(-8 * hidden_size // 3 // 64) * 64
