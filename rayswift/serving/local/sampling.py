"""The next token of one sequence from its logits. Knows torch and a Sampling; knows no model and no batch.

Shape legend: V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from rayswift.errors import ServeError
from rayswift.serving.engine import Sampling

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: the next float32 steps towards zero divide to infinity or by zero."""


class Sampler:
    """Chooses tokens for one answer. Its random numbers are its own: neighbours in the batch do not change them."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = ()) -> None:
        self._sampling, self._prompt = sampling, prompt
        self._chosen = Counter[int]()
        self._seen_V: torch.Tensor | None = None
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def __call__(self, logits_V: torch.Tensor) -> int:
        """The id of the chosen token, which counts from then on. Raises ServeError for logits that are not numbers."""
        best = logits_V.max()
        if not torch.isfinite(best):
            raise ServeError("the model computed logits that are not finite numbers")
        asked = self._sampling
        logits_V = penalized(logits_V, asked, self._seen(logits_V), self._chosen)
        if asked.temperature < GREEDY_BELOW:
            token = int(logits_V.argmax())
        else:
            probs_V = probabilities(logits_V, asked.temperature, asked.top_p, asked.top_k, asked.min_p)
            token = int(torch.multinomial(probs_V.cpu(), 1, generator=self._generator))
        self._chosen[token] += 1
        if self._seen_V is not None:
            self._seen_V[token] = True
        return token

    def _seen(self, logits_V: torch.Tensor) -> torch.Tensor | None:
        """Which tokens were there so far, once that is asked for: made once, for a prompt may be long."""
        if self._seen_V is None and self._sampling.repetition_penalty != 1:
            # ids without a logit stand for media
            ids = [one for one in set(self._prompt) if one < len(logits_V)]
            self._seen_V = torch.zeros(len(logits_V), dtype=torch.bool)
            self._seen_V[ids] = True
            self._seen_V = self._seen_V.to(logits_V.device)
        return self._seen_V


def penalized(
    logits_V: torch.Tensor, sampling: Sampling, seen_V: torch.Tensor | None, chosen: Mapping[int, int]
) -> torch.Tensor:
    """Logits_V with what was said before made less likely, or more; the same tensor where nothing asks for it.

    The repetition penalty (Keskar et al., arXiv 1909.05858) divides positive logits of all tokens `seen_V` so far, and
    multiplies negative ones; then `frequency_penalty` for each time a token was chosen, and `presence_penalty` once,
    are taken away (OpenAI's formula).
    """
    found_V = logits_V
    if seen_V is not None:
        again = sampling.repetition_penalty
        found_V = torch.where(seen_V, torch.where(found_V > 0, found_V / again, found_V * again), found_V)
    if chosen and (sampling.presence_penalty or sampling.frequency_penalty):
        ids = torch.tensor(list(chosen), device=logits_V.device)
        counts = torch.tensor(list(chosen.values()), device=logits_V.device)
        less = sampling.frequency_penalty * counts + sampling.presence_penalty
        found_V = found_V.index_put((ids,), found_V[ids] - less.to(found_V.dtype))
    return found_V


def probabilities(
    logits_V: torch.Tensor, temperature: float, top_p: float, top_k: int = 0, min_p: float = 0.0
) -> torch.Tensor:
    """Probabilities_V after temperature, of the tokens that are kept; those of the others are zero.

    First go tokens below `min_p` of the likeliest one's probability, then all but the `top_k` likeliest, then all but
    the likeliest of total weight `top_p`: the token that crosses it is kept, and always the likeliest one (Holtzman et
    al., arXiv 1904.09751). The order is vLLM's.
    """
    # Shifted before dividing: a tiny temperature then sends all others to -inf instead of everything to inf.
    scaled_V = (logits_V - logits_V.max()) / temperature
    if min_p > 0:  # of probabilities exp(scaled), relative to the likeliest one's
        scaled_V = scaled_V.masked_fill(scaled_V < math.log(min_p), -math.inf)
    if 0 < top_k < len(scaled_V):
        scaled_V = scaled_V.masked_fill(scaled_V < scaled_V.topk(top_k).values[-1], -math.inf)
    probs_V = torch.softmax(scaled_V, dim=-1)
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
