"""What a language model is fed: the embeddings of text and those that towers put in place of placeholders, compared.

A tower whose embeddings are a hundred times larger than those of words, or far from all of them, is what most often
lies behind a multimodal loss that does not fall.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayswift.data.types import PackedBatch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class EmbeddingStats:
    """The input embeddings of one kind of token. `gap` is its distance from text, 0 for text itself.

    `mean`, `std` and `gap` are of the tokens whose embedding is finite, and 0 where there is none.

    The modality gap is the Euclidean distance between the means of the embeddings scaled to length 1 (Liang et al.,
    arXiv 2203.02053): at most 2, and 0 where both kinds lie around the same point.
    """

    kind: str
    num_tokens: int
    mean: float
    std: float
    num_not_finite: int
    gap: float


def input_embeddings(
    model: PreTrainedModel, batch: PackedBatch, placeholders: Mapping[str, int]
) -> tuple[EmbeddingStats, ...]:
    """Statistics of text and of each placeholder (token -> id) in a batch, as they enter the first block."""
    import torch

    seen: list[torch.Tensor] = []
    decoder: Any = model.get_decoder()

    def note(_: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        seen.append(kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else args[0])

    handle = decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            model.eval()(input_ids=batch.input_ids_BT, position_ids=batch.positions(), use_cache=False, **batch.media)
    finally:
        handle.remove()
    ids, embeddings = batch.input_ids_BT.flatten(), seen[-1].float().flatten(0, 1)
    of_media = {token: embeddings[ids == number] for token, number in placeholders.items() if (ids == number).any()}
    text = embeddings[~torch.isin(ids, torch.tensor(list(placeholders.values())))]
    return tuple(_stats(kind, found, text) for kind, found in {"text": text, **of_media}.items())


def _stats(kind: str, found: torch.Tensor, text: torch.Tensor) -> EmbeddingStats:
    import torch

    finite = torch.isfinite(found)
    kept = found[finite.all(-1)]
    gap = float((_centre(kept) - _centre(text)).norm()) if len(kept) and kind != "text" else 0.0
    mean, std = (float(kept.mean()), float(kept.std())) if len(kept) else (0.0, 0.0)
    return EmbeddingStats(kind, len(found), mean, std, len(found) - len(kept), gap)


def _centre(embeddings: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import normalize

    return normalize(embeddings, dim=-1).mean(0)
