"""What an export makes of rows, those of a calibration not among them, beside what the trained model made of them.

Shape legend: B documents, one at a time; T positions of a document, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from typing import TYPE_CHECKING

import numpy as np

from rayswift.data.collate import PackedSequence, collate
from rayswift.data.media.features import model_inputs
from rayswift.data.types import Example, PackedBatch
from rayswift.export.measured import HeldOut
from rayswift.methods.sft import Sft
from rayswift.parallel.logprobs import token_logprobs
from rayswift.training.evaluate import LossSum

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from rayswift.export.rows import Rows
    from rayswift.export.terms import Bounds


@dataclass(frozen=True)
class Said:
    """Of rows: the mean of -log p over their trained tokens, and the most likely token at the place of each."""

    loss: float
    likeliest: tuple[int, ...]


def said_of(model: torch.nn.Module, examples: Sequence[Example]) -> Said:
    """What a model makes of documents, each alone, in float32; trained tokens count by their weight in the loss.

    The loss is that of a run. The forward pass is not: it is that of the calibration, and its logits are needed too.
    """
    import torch

    model.eval()
    method, total, likeliest = Sft(Sft.Config()), LossSum(), list[int]()
    for example in examples:
        batch = _batch(example)
        with torch.no_grad():
            logits_BTV = model(**model_inputs(example), use_cache=False).logits
            total.add(method, token_logprobs(logits_BTV, batch.targets_BT), batch)
        likeliest += logits_BTV.argmax(-1)[batch.weights_BT > 0].tolist()
    return Said(total.mean, tuple(likeliest))


def _batch(example: Example) -> PackedBatch:
    """A document as training has it, without padding; for its targets and weights."""
    ids, weights = np.array(example.input_ids), np.array(example.loss_mask)
    return collate([PackedSequence(ids, weights, [len(ids)])], pad_id=0, multiple_of=1)


def judged(before: Said, rows: Rows, model: PreTrainedModel, bounds: Bounds) -> HeldOut:
    """What became of the rows that the trained model had `before` made something of."""
    after = said_of(model, rows.examples)
    same = [a == b for a, b in zip(before.likeliest, after.likeliest, strict=True)]
    return HeldOut(
        rows=rows.used,
        trained_on=rows.trained_on,
        reference_loss=before.loss,
        loss=after.loss,
        perplexity_ratio=exp(min(after.loss - before.loss, 100.0)),
        bound_perplexity_ratio=bounds.perplexity,
        top1_agreement=sum(same) / len(same),
        bound_top1_agreement=bounds.top1,
    )


def demands(held_out: HeldOut | None) -> tuple[tuple[str, bool], ...]:
    """What is demanded of an export on rows."""
    if held_out is None:
        return ()
    ratio, bound = held_out.perplexity_ratio, held_out.bound_perplexity_ratio
    same, least = held_out.top1_agreement, held_out.bound_top1_agreement
    return (
        (f"perplexity on {held_out.told} is {ratio:.4g} of the trained model's (bound {bound:.4g})", ratio <= bound),
        (f"the most likely token is the same at {same:.1%} of their places (bound {least:.1%})", same >= least),
    )
