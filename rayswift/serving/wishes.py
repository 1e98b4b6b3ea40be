"""How an answer is generated: what a request wishes, within what its model and this server can do."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from rayswift.serving.api_errors import ApiError, too_long
from rayswift.serving.defaults import SamplingDefaults
from rayswift.serving.engine import Sampling
from rayswift.serving.openai import ChatRequest, TextRequest
from rayswift.serving.tools import Calling

_BY_DEFAULT = tuple(one.name for one in fields(SamplingDefaults) if one.name != "max_new_tokens")


def sampling(
    request: ChatRequest | TextRequest,
    *,
    defaults: SamplingDefaults,
    calling: Calling | None = None,
    num_prompt_tokens: int,
    room: int,
    max_new_tokens: int,
    place: str = "messages",
) -> Sampling:
    """How one prompt is answered; `room` is the model's length. Raises ApiError for what does not fit.

    `calling` are the request's tools in the form in which this model calls them; `place` is where the prompt stands.

    What the client has no wish for is as `defaults` have it; without either the answer may take what room is left, up
    to the server's `max_new_tokens`.
    """
    wanted, left = request.wanted_tokens, room - num_prompt_tokens
    if left < 1:
        raise too_long(f"the prompt has {num_prompt_tokens} tokens, which leaves no room for an answer", room, place)
    explicit = request.max_tokens or getattr(request, "max_completion_tokens", None)
    if explicit is not None and explicit > max_new_tokens:
        raise ApiError(
            f"max_tokens: {explicit} is more than this server generates, {max_new_tokens}",
            param="max_tokens",
            code="invalid_value",
        )
    if explicit is not None and explicit > left:
        raise too_long(f"the prompt has {num_prompt_tokens} tokens and the answer may have {explicit}", room, place)
    return Sampling(
        max_new_tokens=min(wanted or defaults.max_new_tokens or max_new_tokens, max_new_tokens, left),
        **_chosen(request, defaults),
        stop=tuple(request.stop),
        seed=request.seed,
        logprobs=request.num_logprobs,
        json_schema=calling.schema_text if calling else request.json_schema,
        grammar=calling.grammar if calling else None,
    )


def _chosen(request: ChatRequest | TextRequest, defaults: SamplingDefaults) -> dict[str, Any]:
    wishes = {name: getattr(request, name) for name in _BY_DEFAULT}
    return {name: getattr(defaults, name) if wish is None else wish for name, wish in wishes.items()}


def check_choices(request: ChatRequest | TextRequest, most: int) -> None:
    """Raises ApiError for more answers than one request may ask for."""
    if request.num_choices > most:
        message = f"n: {request.num_choices} answers in one request are more than {most}"
        raise ApiError(message, param="n", code="invalid_value")


def for_choice(sampling: Sampling, choice: int) -> Sampling:
    """The sampling of one of a prompt's `n` answers: a seed is counted up, so that the answers differ."""
    return sampling if sampling.seed is None or choice == 0 else replace(sampling, seed=sampling.seed + choice)
