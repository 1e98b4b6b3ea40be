"""What a version makes of verification prompts: its greedy answers, its vectors, and whether another's are its own.

Knows a served model; knows neither Ray nor who asks. How answers are compared is known by `serving/promotion.py`.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from rayswift.errors import ServeError
from rayswift.serving.engine import Prompt, Request, Sampling
from rayswift.serving.served import ServedModel

Asked = list[dict[str, Any]] | str
"""A conversation of text, or a text to continue."""
_MAX_PLACES = 8
"""Of an answer, at which a token is chosen anew: each takes a pass over all before it."""


async def answer(model: ServedModel, asked: Asked, max_new_tokens: int) -> str:
    """The greedy answer, prompt and penalties as for any client who asks for no other. Raises ServeError."""
    prompt = await _prompt(model, asked)
    room = min(max_new_tokens, model.engine.max_model_len - len(prompt.ids))
    if room < 1:
        raise ServeError(f"a prompt of {len(prompt.ids)} tokens leaves no room for an answer")
    request = Request(f"verify-{id(prompt)}", prompt, model.defaults.greedy(room))
    return "".join([delta.text async for delta in model.engine.generate(request)])


async def follows(model: ServedModel, asked: Asked, said: str) -> float:
    """The fraction of an answer's tokens that are the likeliest ones here too, each behind those before it.

    Of up to _MAX_PLACES tokens, spread evenly over those that there is room for. Raises ServeError.
    """
    prompt, ids = await _prompt(model, asked), await asyncio.to_thread(model.prompts.answer_ids, said)
    ids = ids[: model.engine.max_model_len - len(prompt.ids)]
    if not ids:
        raise ServeError(f"a prompt of {len(prompt.ids)} tokens leaves no room for an answer")
    num_places = min(_MAX_PLACES, len(ids))
    places = [number * len(ids) // num_places for number in range(num_places)]
    chosen = [await _next(model, prompt, ids[:place]) for place in places]
    return sum(token == ids[place] for token, place in zip(chosen, places, strict=True)) / num_places


async def vector(model: ServedModel, text: str) -> np.ndarray:
    """The vector of a text. Raises ServeError."""
    prompt = await asyncio.to_thread(model.prompts.text, text)
    if len(prompt.ids) > model.engine.max_model_len:
        raise ServeError(f"a text of {len(prompt.ids)} tokens is too long")
    return await model.engine.embed(prompt.ids)


async def _prompt(model: ServedModel, asked: Asked) -> Prompt:
    if isinstance(asked, str):
        return await asyncio.to_thread(model.prompts.text, asked)
    return await asyncio.to_thread(model.prompts.conversation, asked)


async def _next(model: ServedModel, prompt: Prompt, begun: list[int]) -> int | None:
    """The likeliest token behind a prompt and the beginning of its answer; None for the end of the answer.

    It is taken from what is said of its likelihood: an answer's text does not tell which tokens it is made of.
    """
    behind = Prompt((*prompt.ids, *begun))
    sampling = Sampling(max_new_tokens=1, temperature=0, logprobs=1)
    deltas = [delta async for delta in model.engine.generate(Request(f"follow-{id(behind)}", behind, sampling))]
    scored = [one.id for delta in deltas for one in delta.logprobs]
    return scored[0] if scored else None
