"""Old spellings that keep working: what users of other trainers type by habit, mapped on to a job's keys.

Only names that mean exactly one thing here. Every other foreign key is refused with a suggestion (`keys.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rayswift.config import keys
from rayswift.errors import ConfigError

_Settings = dict[str, Any]


def _axis(target: str) -> Callable[[str, Any], _Settings]:
    return lambda _name, value: {target: value}


def _deepspeed(_name: str, value: Any) -> _Settings:
    """A DeepSpeed JSON, or ms-swift's `zero2_offload` and the like; nothing where it is switched off."""
    return {} if value in (None, "", False) else {"parallel.engine": "deepspeed", "parallel.deepspeed": value}


def _four_bits(name: str, value: Any) -> _Settings:
    """QLoRA's base. `8` is not a way of storing a base here."""
    if value in (None, False, "none"):
        return {}
    if value not in (4, True) or (value is True) != (name == "load_in_4bit"):
        raise ConfigError("is not a base in 4 bits", path=name, value=value, fix="use model.quantization=nf4, or null")
    return {"model.quantization": "nf4"}


def _fsdp(name: str, value: Any) -> _Settings:
    """Hugging Face's words for FSDP that shards everything, which `fsdp2` does of itself."""
    words = set(str(value).replace(",", " ").split()) if not isinstance(value, list) else set(map(str, value))
    if value in (None, False) or not words:
        return {}
    if strange := words - {"full_shard", "auto_wrap", "offload", "fsdp", "fsdp2", "True"}:
        fix = "say it with parallel.dp_replicate and parallel.dp_shard"
        raise ConfigError(
            f"has {', '.join(sorted(strange))}, which FSDP2 has no word for", path=name, value=value, fix=fix
        )
    offload: _Settings = {"parallel.offload": "parameters"} if "offload" in words else {}
    return {"parallel.engine": "fsdp2", **offload}


def _turns(meant: str) -> Callable[[str, Any], _Settings]:
    """A switch for which turns are trained; switched off, it says what is the default here."""
    return lambda _name, value: {"data.loss": meant} if value else {}


def _mixing(name: str, value: Any) -> _Settings:
    """LLaMA-Factory's words for how sources are mixed."""
    meant = {"concat": "weights", "interleave_under": "first_exhausted", "interleave_over": "all_exhausted"}
    if value not in meant:
        raise ConfigError(f"is none of {', '.join(meant)}", path=name, value=value, fix="use data.mixing.stopping")
    return {"data.mixing.stopping": meant[value]}


_OLD: dict[str, Callable[[str, Any], _Settings]] = {
    "tensor_parallel_size": _axis("parallel.tp"),
    "tensor_model_parallel_size": _axis("parallel.tp"),
    "pipeline_parallel_size": _axis("parallel.pp"),
    "pipeline_model_parallel_size": _axis("parallel.pp"),
    "context_parallel_size": _axis("parallel.cp"),
    "sequence_parallel_size": _axis("parallel.cp"),
    "expert_parallel_size": _axis("parallel.ep"),
    "expert_model_parallel_size": _axis("parallel.ep"),
    "zero_stage": _axis("parallel.zero_stage"),
    "deepspeed": _deepspeed,
    "fsdp": _fsdp,
    "loss_scale": _axis("data.loss"),
    "mask_history": _turns("last_round"),
    "train_on_inputs": _turns("all"),
    "train_on_prompt": _turns("all"),
    "stopping_strategy": _axis("data.mixing.stopping"),
    "mix_strategy": _mixing,
    "quantization_bit": _four_bits,
    "quant_bits": _four_bits,
    "load_in_4bit": _four_bits,
}


def normal(key: str) -> str:
    """A key as people write it, with one kind of dash and case."""
    return key.replace("-", "_").lower()


def is_old(key: str) -> bool:
    """Whether a key is an old spelling that is mapped on."""
    return normal(key) in _OLD


def translate(key: str, value: Any) -> _Settings:
    """The settings, by dotted key, that an old spelling stands for; none where it switches something off."""
    return _OLD[normal(key)](normal(key), value)


@dataclass(frozen=True)
class Setting:
    """A value for a dotted key, and what was written for it."""

    key: str
    value: Any
    spelled: str
    typed: Any


def settings(pairs: Iterable[tuple[str, Any]]) -> list[Setting]:
    """The settings behind keys and values that were written in one place, old spellings mapped on.

    Raises ConfigError for one setting that has two values in two spellings. Written twice in one, the last one counts.
    """
    found: dict[str, Setting] = {}
    result = []
    for written, typed in pairs:
        meant = translate(written, typed) if is_old(written) else {written: typed}
        for one in (Setting(key, value, written, typed) for key, value in meant.items()):
            before = found.get(one.key, one)
            if before.spelled != one.spelled and before.value != one.value:
                raise two_values(before, one)
            found[one.key] = one
            result.append(one)
    return result


def two_values(one: Setting, other: Setting) -> ConfigError:
    """The refusal of a setting that is written in two spellings with two values."""
    rule = f"and {other.spelled}={other.typed} are two values of {one.key}"
    return ConfigError(rule, path=one.spelled, value=one.typed, fix="keep one of the two")


def notes(found: Iterable[Setting]) -> tuple[str, ...]:
    """What a person is told to learn the keys of this version: `tensor_parallel_size is parallel.tp here`."""
    meant: dict[str, dict[str, None]] = {}
    for one in found:
        if is_old(one.spelled):
            meant.setdefault(one.spelled, {})[one.key] = None
    return tuple(f"{spelled} is {' and '.join(targets)} here" for spelled, targets in meant.items())


def as_overrides(args: Sequence[str]) -> list[str]:
    """The arguments of a command with `--tensor_parallel_size 2` written as `tensor_parallel_size=2`.

    So are the other trainers' options, which are then refused with a suggestion instead of as no option at all.
    """
    rest, found = list(args), []
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        word = normal(name.removeprefix("--"))
        if not name.startswith("--") or not (is_old(word) or keys.is_foreign(word)):
            found.append(name + equals + value)
            continue
        if not equals:
            is_value = bool(rest) and not rest[0].startswith("--") and "=" not in rest[0]
            value = rest.pop(0) if is_value else "true"
        found.append(f"{word}={value}")
    return found
