"""What vLLM is told of how to choose tokens, and what its outputs are as deltas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayswift.errors import ServeError
from rayswift.serving.engine import INCOMPLETE, Delta, Sampling, TokenLogprob

MAX_LOGPROBS = 20
"""Most alternatives beside a chosen token that the engine is started for."""


def params(sampling: Sampling, stop_ids: Sequence[int]) -> Any:
    """The SamplingParams of an answer that ends at one of `stop_ids` and comes as deltas."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    schema, grammar = sampling.json_schema, sampling.grammar
    is_held = schema is not None or grammar is not None
    structured = StructuredOutputsParams(json=schema, grammar=grammar) if is_held else None
    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=max(sampling.top_k, 0),
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        stop=list(sampling.stop),
        stop_token_ids=list(stop_ids),
        seed=sampling.seed,
        logprobs=sampling.logprobs,
        structured_outputs=structured,
        spaces_between_special_tokens=False,
        output_kind=RequestOutputKind.DELTA,
    )


def delta(output: Any, num_logprobs: int | None) -> Delta:
    """What one of vLLM's outputs adds to an answer. Raises ServeError for an answer that vLLM broke off."""
    reason = output.finish_reason
    if reason not in (None, "stop", "length"):
        raise ServeError(f"ended an answer with {reason}", path="engine", value="vllm", fix="ask again")
    scored = () if num_logprobs is None or output.logprobs is None else output.logprobs
    found = tuple(_scored(token, at, num_logprobs or 0) for token, at in zip(output.token_ids, scored, strict=False))
    return Delta(output.text, len(output.token_ids), reason, found)


def _scored(token: int, alternatives: Mapping[int, Any], wanted: int) -> TokenLogprob:
    ranked = sorted(alternatives.values(), key=lambda one: one.rank)[:wanted]
    chosen = alternatives[token]
    return TokenLogprob(_text(chosen), chosen.logprob, tuple((_text(one), one.logprob) for one in ranked), token)


def _text(scored: Any) -> str:
    """A token's text; of a part of a character, for which vLLM has none, the mark that decoders write."""
    return scored.decoded_token or INCOMPLETE
