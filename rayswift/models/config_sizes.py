"""Whether the sizes in a config.json can be those of a model, before transformers builds anything from them.

Knows the names configs give sizes. Loads neither torch nor transformers: building the real config takes the driver
three seconds, and the worker that does it says the rest. Knows no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayswift.errors import ConfigError
from rayswift.models.shapes import OPTIONS

_SIZES = ("layers", "hidden_size", "heads", "kv_heads", "intermediate_size", "max_length", "vocab_size")
# The others are 0 or -1 in some published configs, for "none" or "no limit".
_POSITIVE = ("layers", "hidden_size", "heads", "vocab_size")
# Architectures with a table of as many positions as their config says; the others compute any position. Found by
# running each of transformers 5.17 on more tokens than its config allows. A config with n_positions always has one.
_TABLES = frozenset({
    "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt", "blenderbot", "blenderbot-small",
    "electra", "ernie", "gpt_neo", "marian", "mbart", "megatron-bert", "mpt", "mvp", "opt", "pegasus", "rembert",
    "roc_bert", "roformer", "trocr",
})  # fmt: skip
_FIX = "copy the config.json of the model again"


def check_sizes(config: Mapping[str, Any], path: str, *, field: str = "model.path") -> None:
    """Raises ConfigError naming the field of the config that is no size, or does not agree with another one."""
    nested = config.get("text_config")
    text = nested if isinstance(nested, Mapping) else config
    for size in _SIZES:
        if (name := _name_of(size, text)) is not None:
            _check_size(name, text[name], path, field, positive=size in _POSITIVE)
    layers, types = _name_of("layers", text), text.get("layer_types")
    if layers is not None and isinstance(types, list) and len(types) != text[layers]:
        raise ConfigError(
            f"has a config.json whose layer_types has {len(types)} entries for {layers}={text[layers]}",
            path=field,
            value=path,
            fix=_FIX,
        )


def num_positions(config: Mapping[str, Any]) -> int | None:
    """The longest sequence a model can take at all; None where positions are computed and longer ones only unusual."""
    if config.get("model_type") not in _TABLES and "n_positions" not in config:
        return None
    name = _name_of("max_length", config)
    return None if name is None else int(config[name])


def _name_of(size: str, config: Mapping[str, Any]) -> str | None:
    """What this config calls a size; None where it does not have it."""
    return next((name for name in OPTIONS[size] if config.get(name) is not None), None)


def _check_size(name: str, value: Any, path: str, field: str, *, positive: bool) -> None:
    """A list is left alone: some architectures have a size per layer."""
    if isinstance(value, list):
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and (value > 0 or not positive):
        return
    raise ConfigError(
        f"has a config.json whose {name}={value!r} is not a {'positive' if whole else 'whole'} number",
        path=field,
        value=path,
        fix=_FIX,
    )
