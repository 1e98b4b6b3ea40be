"""How an answer is generated: what a request wishes, within what its model and this server can do."""

from __future__ import annotations

from dataclasses import replace

from rayswift.serving.api_errors import ApiError, too_long
from rayswift.serving.engine import Sampling
from rayswift.serving.openai import ChatRequest, TextRequest
from rayswift.serving.tools import Calling


def sampling(
    request: ChatRequest | TextRequest,
    *,
    calling: Calling | None = None,
    num_prompt_tokens: int,
    room: int,
    max_new_tokens: int,
) -> Sampling:
    """How one prompt is answered; `room` is the model's length. Raises ApiError for what does not fit.

    `calling` are the request's tools in the form in which this model calls them.

    Without a wish of the client's the answer may take what room is left, up to the server's `max_new_tokens`.
    """
    wanted, left = request.wanted_tokens, room - num_prompt_tokens
    if left < 1:
        raise too_long(f"the prompt has {num_prompt_tokens} tokens, which leaves no room for an answer", room)
    explicit = request.max_tokens or getattr(request, "max_completion_tokens", None)
    if explicit is not None and explicit > max_new_tokens:
        raise ApiError(
            f"max_tokens: {explicit} is more than this server generates, {max_new_tokens}",
            param="max_tokens",
            code="invalid_value",
        )
    if explicit is not None and explicit > left:
        raise too_long(f"the prompt has {num_prompt_tokens} tokens and the answer may have {explicit}", room)
    return Sampling(
        max_new_tokens=min(wanted or max_new_tokens, max_new_tokens, left),
        temperature=request.temperature,
        top_p=request.top_p,
        stop=tuple(request.stop),
        seed=request.seed,
        logprobs=request.num_logprobs,
        json_schema=calling.schema_text if calling else request.json_schema,
        grammar=calling.grammar if calling else None,
    )


def check_choices(request: ChatRequest | TextRequest, most: int) -> None:
    """Raises ApiError for more answers than one request may ask for."""
    if request.num_choices > most:
        message = f"n: {request.num_choices} answers in one request are more than {most}"
        raise ApiError(message, param="n", code="invalid_value")


def for_choice(sampling: Sampling, choice: int) -> Sampling:
    """The sampling of one of a prompt's `n` answers: a seed is counted up, so that the answers differ."""
    return sampling if sampling.seed is None or choice == 0 else replace(sampling, seed=sampling.seed + choice)
