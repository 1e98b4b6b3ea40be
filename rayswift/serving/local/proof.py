"""Whether a model answers from a cache as it does without one: a few forward passes on random ids at engine start.

Some architectures do not take a `DynamicCache` (they keep a state of their own, lost between two calls) or look at
columns instead of positions (a window within a shared cache). They answer without an error, and wrongly.
Shape legend: T positions, V vocabulary.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedModel

from rayswift.errors import ConfigError
from rayswift.export.shown import shown
from rayswift.serving.engine import Prompt
from rayswift.serving.local.batch import Batch, Prefill, SoloBatch, keep_logits, open_batch

if TYPE_CHECKING:
    from rayswift.data.media.encoder import MediaEncoder

_NUM_STEPS = 4
_SHORT_TOKENS, _LONG_TOKENS, _MOST_TOKENS = 5, 23, 600
_BOUNDS = {torch.float32: 0.01, torch.float64: 0.01}
_HALF_BOUND = 0.1
"""Relative differences. Measured on random models: where the cache works, 1e-6 in float32 and up to 0.025 in bfloat16
(64 layers); where it does not, 0.07 to 1.1. The median over steps forgives one where rounding picks another expert."""


def prove(model: PreTrainedModel, folder: str, max_model_len: int, encoder: MediaEncoder | None = None) -> None:
    """Raises ConfigError when rows decoded together in the model's batch are not what full passes compute.

    With an `encoder` a row with a medium of each kind is among them.
    """
    bound = _BOUNDS.get(model.dtype, _HALF_BOUND)
    wrong = [found for found in differences(model, max_model_len, encoder) if not found <= bound]  # NaN is wrong too
    if wrong:
        raise ConfigError(
            f"is a {model.config.model_type} model, whose answers from a cache are not its own: logits differ by "
            f"{wrong[0]:.2g} of their size from those of a full pass, more than {bound}",
            path="model",
            value=folder,
            fix="serve it with another engine; `local` serves models that keep keys and values, such as qwen3 or llama",
        )


@torch.inference_mode()
def differences(model: PreTrainedModel, max_model_len: int, encoder: MediaEncoder | None = None) -> list[float]:
    """For rows decoded together, the median over steps of |cached - full| / |full - its mean|.

    They are a short and a long text, and one row for each kind of media.
    """
    num_axes = encoder.num_axes if encoder else 0
    rows = [*_texts(model, max_model_len, encoder), *_shown(model, max_model_len, encoder)]
    if not rows:
        return []
    batch = open_batch(model, num_axes)
    first = [joined(batch, model, _begun(row), num_axes) for row in rows]
    steps = [batch.decode([row.ids[step] for row in rows]) for step in range(-_NUM_STEPS, 0)]
    found = []
    for number, row in enumerate(rows):
        cached_TV = torch.stack([first[number], *(logits_BV[number] for logits_BV in steps)])
        found.append(_difference(cached_TV, _full(model, row, num_axes)))
    return found


def _texts(model: PreTrainedModel, max_model_len: int, encoder: MediaEncoder | None) -> list[Prompt]:
    """Two rows of ids, prompt and decoded tokens; the long one goes beyond a window of the config where it is small."""
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("window_size", "sliding_window", "attention_window_size")]
    window = max((w for w in windows if isinstance(w, int) and w < _MOST_TOKENS), default=0)
    room = max_model_len - _NUM_STEPS
    lengths = [_NUM_STEPS + min(length, room) for length in (_SHORT_TOKENS, max(_LONG_TOKENS, window + _SHORT_TOKENS))]
    return [Prompt(_random_ids(model, length, encoder)) for length in lengths] if room >= 1 else []


def _shown(model: PreTrainedModel, max_model_len: int, encoder: MediaEncoder | None) -> list[Prompt]:
    """A row with a question about a medium of each kind, continued at random; none that would be too long."""
    rows = []
    for example in shown(encoder).values():
        ids = (*example.input_ids, *_random_ids(model, 2 * _NUM_STEPS, encoder))
        places = encoder.positions if encoder else None
        rows.append(Prompt(ids, example.media, places(np.asarray(ids), example.media) if places else None))
    return [row for row in rows if len(row.ids) <= max_model_len]


def _random_ids(model: PreTrainedModel, count: int, encoder: MediaEncoder | None) -> tuple[int, ...]:
    """The same for the same count. With an encoder none is a placeholder, nor says where a medium begins or ends."""
    kept = torch.ones(model.config.get_text_config().vocab_size)
    if encoder is not None:
        special = {*encoder.placeholders.values(), *encoder.processor.tokenizer.all_special_ids}
        kept[[number for number in special if number < len(kept)]] = 0
    generator = torch.Generator().manual_seed(count)
    return tuple(torch.multinomial(kept, count, replacement=True, generator=generator).tolist())


def _begun(row: Prompt) -> Prompt:
    """Without the tokens that are decoded."""
    rope_AT = None if row.rope_AT is None else row.rope_AT[:, :-_NUM_STEPS]
    return Prompt(row.ids[:-_NUM_STEPS], row.media, rope_AT)


def joined(batch: Batch, model: PreTrainedModel, prompt: Prompt, num_axes: int) -> torch.Tensor:
    """Logits_V after a prompt, which has joined the batch; read in two chunks where the engine reads in chunks."""
    chunk_tokens = None if isinstance(batch, SoloBatch) else len(prompt.ids) // 2 + 1
    prefill = Prefill(model, prompt, chunk_tokens, num_axes)
    while (logits_V := prefill.advance()) is None:
        pass
    batch.join(prefill.cache, prefill.shift)
    return logits_V


def _full(model: PreTrainedModel, row: Prompt, num_axes: int) -> torch.Tensor:
    """Logits_TV of the last positions, computed at once and without a cache."""
    inputs = Prefill(model, row, None, num_axes).inputs(slice(None))
    keep = keep_logits(model, _NUM_STEPS + 1)
    logits_TV: torch.Tensor = model(**inputs, use_cache=False, **keep).logits[0, -_NUM_STEPS - 1 :].float()
    return logits_TV


def _difference(cached_TV: torch.Tensor, full_TV: torch.Tensor) -> float:
    sizes_T = (full_TV - full_TV.mean(-1, keepdim=True)).norm(dim=-1)
    apart_T = (cached_TV - full_TV).norm(dim=-1)
    return float(median((apart_T / sizes_T.clamp(min=1e-20)).tolist()))
