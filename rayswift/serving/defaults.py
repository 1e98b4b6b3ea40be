"""What an answer is sampled with where its request does not say: what the model's folder wishes.

That is its generation config, as `vllm serve` reads it. Knows transformers' file; knows no request.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any

from rayswift.models.loading import load_config, local_folder
from rayswift.serving.engine import Sampling


@dataclass(frozen=True)
class SamplingDefaults:
    """How a model's answers are sampled unless asked for otherwise; as the fields of `Sampling`."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    """What an answer may have of which nobody says how long it may be."""

    @classmethod
    def of(cls, folder: str | os.PathLike[str]) -> SamplingDefaults:
        """Those of a model's folder. What its file says in no number, or nonsense of, is left as it is by default."""
        wished = _generation_config(str(local_folder(str(folder))))
        found: dict[str, Any] = {one.name: _number(one.name, wished.get(one.name)) for one in fields(cls)}
        return cls(**{name: value for name, value in found.items() if value is not None})

    def greedy(self, max_new_tokens: int) -> Sampling:
        """How a greedy answer is made: penalties change it, too."""
        return Sampling(
            max_new_tokens,
            temperature=0,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
        )


_BOUNDS = {
    "temperature": (0, 2), "top_p": (1e-9, 1), "top_k": (-1, 2**31), "min_p": (0, 1), "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2), "repetition_penalty": (1e-3, 2), "max_new_tokens": (1, 2**31),
}  # fmt: skip
"""What requests may ask for, too."""
_WHOLE = ("top_k", "max_new_tokens")


def _number(name: str, value: Any) -> float | None:
    """A setting as engines take it; None for what is none."""
    least, most = _BOUNDS[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        return None
    if name not in _WHOLE:
        return value
    return int(value) if value == int(value) else None  # 20.0 is 20


def _generation_config(folder: str) -> dict[str, Any]:
    from transformers import GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(folder)
    except (ValueError, TypeError):  # of settings that contradict each other none is wished
        return {}
    except OSError:  # older folders have such settings among the model's own
        config = GenerationConfig.from_model_config(load_config(folder))
    found: dict[str, Any] = config.to_diff_dict()
    return found
