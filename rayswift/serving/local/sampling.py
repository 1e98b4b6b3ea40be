"""The next token of one sequence from its logits. Knows torch and a Sampling; knows no model and no batch.

Shape legend: V vocabulary.
"""

from __future__ import annotations

import torch

from rayswift.errors import ServeError
from rayswift.serving.engine import Sampling

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: the next float32 steps towards zero divide to infinity or by zero."""


class Sampler:
    """Chooses tokens for one answer. Its random numbers are its own: neighbours in the batch do not change them."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def __call__(self, logits_V: torch.Tensor) -> int:
        """The id of the chosen token. Raises ServeError for logits that are not numbers."""
        best = logits_V.max()
        if not torch.isfinite(best):
            raise ServeError("the model computed logits that are not finite numbers")
        if self._sampling.temperature < GREEDY_BELOW:
            return int(logits_V.argmax())
        probs_V = probabilities(logits_V, self._sampling.temperature, self._sampling.top_p)
        return int(torch.multinomial(probs_V.cpu(), 1, generator=self._generator))


def probabilities(logits_V: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Probabilities_V after temperature, with all but the likeliest tokens of total weight `top_p` set to zero.

    The token that crosses `top_p` is kept, and always the likeliest one (Holtzman et al., arXiv 1904.09751).
    """
    # Shifted before dividing: a tiny temperature then sends all others to -inf instead of everything to inf.
    probs_V = torch.softmax((logits_V - logits_V.max()) / temperature, dim=-1)
    if top_p >= 1:
        return probs_V
    sorted_V, order_V = probs_V.sort(descending=True)
    before_V = sorted_V.cumsum(dim=-1) - sorted_V
    kept_V = torch.where(before_V < top_p, sorted_V, 0.0)
    kept_V[0] = sorted_V[0]  # a top_p below the smallest float32 compares as 0, which keeps nothing
    return torch.zeros_like(probs_V).scatter(0, order_V, kept_V / kept_V.sum())


def likeliest(logits_V: torch.Tensor, chosen: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability of the chosen token and the `count` likeliest (id, log-probability), without temperature."""
    logprobs_V = torch.log_softmax(logits_V, dim=-1)
    values, ids = logprobs_V.topk(min(count, len(logprobs_V)))
    return float(logprobs_V[chosen]), list(zip(ids.tolist(), values.tolist(), strict=True))
