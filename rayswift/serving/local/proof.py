"""Whether a model answers from a cache as it does without one: a few forward passes on random ids at engine start.

Some architectures do not take a `DynamicCache` (they keep a state of their own, lost between two calls) or look at
columns instead of positions (a window within a shared cache). They answer without an error, and wrongly.
Shape legend: T positions, V vocabulary.
"""

from __future__ import annotations

from statistics import median

import torch
from transformers import PreTrainedModel

from rayswift.errors import ConfigError
from rayswift.serving.local.batch import Batch, Prefill, SoloBatch, keep_logits, open_batch

_NUM_STEPS = 4
_SHORT_TOKENS, _LONG_TOKENS, _MOST_TOKENS = 5, 23, 600
_BOUNDS = {torch.float32: 0.01, torch.float64: 0.01}
_HALF_BOUND = 0.1
"""Relative differences. Measured on random models: where the cache works, 1e-6 in float32 and up to 0.025 in bfloat16
(64 layers); where it does not, 0.07 to 1.1. The median over steps forgives one where rounding picks another expert."""


def prove(model: PreTrainedModel, folder: str, max_model_len: int) -> None:
    """Raises ConfigError when two rows decoded together in the model's batch are not what full passes compute."""
    bound = _BOUNDS.get(model.dtype, _HALF_BOUND)
    wrong = [found for found in differences(model, max_model_len) if not found <= bound]  # NaN is wrong too
    if wrong:
        raise ConfigError(
            f"is a {model.config.model_type} model, whose answers from a cache are not its own: logits differ by "
            f"{wrong[0]:.2g} of their size from those of a full pass, more than {bound}",
            path="model",
            value=folder,
            fix="serve it with another engine; `local` serves models that keep keys and values, such as qwen3 or llama",
        )


@torch.inference_mode()
def differences(model: PreTrainedModel, max_model_len: int) -> list[float]:
    """For a short and a long row decoded together, the median over steps of |cached - full| / |full - its mean|."""
    batch, tokens = open_batch(model), _random_rows(model, max_model_len)
    if not tokens:
        return []
    first = [_joined(batch, model, row[:-_NUM_STEPS]) for row in tokens]
    steps = [batch.decode([row[step] for row in tokens]) for step in range(-_NUM_STEPS, 0)]
    found = []
    for number, row in enumerate(tokens):
        cached_TV = torch.stack([first[number], *(logits_BV[number] for logits_BV in steps)])
        found.append(_difference(cached_TV, _full(model, row)))
    return found


def _random_rows(model: PreTrainedModel, max_model_len: int) -> list[list[int]]:
    """Two rows of ids, prompt and decoded tokens; the long one goes beyond a window of the config where it is small."""
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("window_size", "sliding_window", "attention_window_size")]
    window = max((w for w in windows if isinstance(w, int) and w < _MOST_TOKENS), default=0)
    room = max_model_len - _NUM_STEPS
    generator = torch.Generator().manual_seed(0)
    lengths = [_NUM_STEPS + min(length, room) for length in (_SHORT_TOKENS, max(_LONG_TOKENS, window + _SHORT_TOKENS))]
    if room < 1:
        return []
    return [torch.randint(config.vocab_size, (length,), generator=generator).tolist() for length in lengths]


def _joined(batch: Batch, model: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    """Logits_V after a prompt, which has joined the batch; read in two chunks where the engine reads in chunks."""
    chunk_tokens = None if isinstance(batch, SoloBatch) else len(prompt) // 2 + 1
    prefill = Prefill(model, tuple(prompt), chunk_tokens)
    while (logits_V := prefill.advance()) is None:
        pass
    batch.join(prefill.cache)
    return logits_V


def _full(model: PreTrainedModel, row: list[int]) -> torch.Tensor:
    """Logits_TV of the last positions, computed at once and without a cache."""
    ids_1T = torch.tensor([row], device=model.device)
    keep = keep_logits(model, _NUM_STEPS + 1)
    logits_TV: torch.Tensor = model(input_ids=ids_1T, use_cache=False, **keep).logits[0, -_NUM_STEPS - 1 :].float()
    return logits_TV


def _difference(cached_TV: torch.Tensor, full_TV: torch.Tensor) -> float:
    sizes_T = (full_TV - full_TV.mean(-1, keepdim=True)).norm(dim=-1)
    apart_T = (cached_TV - full_TV).norm(dim=-1)
    return float(median((apart_T / sizes_T.clamp(min=1e-20)).tolist()))
