"""Greedy answers of a model in memory, and how far two sets of them agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rayswift.data.media.features import model_inputs
from rayswift.data.types import Example
from rayswift.models.config_sizes import num_positions

if TYPE_CHECKING:
    import torch

MAX_PROMPT_TOKENS, GREEDY_TOKENS = 128, 16
"""Of a prompt of text, and of an answer. A prompt with media is given whole."""


def prompt_room(positions: int | None) -> int:
    """The most tokens of a prompt of text for a model of so many positions: its answer needs some behind it."""
    return MAX_PROMPT_TOKENS if positions is None else max(1, min(MAX_PROMPT_TOKENS, positions - GREEDY_TOKENS))


def greedy_of(model: torch.nn.Module, prompts: Sequence[list[int] | Example]) -> tuple[list[int], ...]:
    """The `GREEDY_TOKENS` most likely tokens behind each prompt, one after the other, without a cache."""
    return tuple(_answer(model, prompt) for prompt in prompts)


def agreement(one: Sequence[list[int]], other: Sequence[list[int]]) -> float:
    """The fraction of tokens before the first that differs: what comes behind it answers something else."""
    shared = [next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
              for a, b in zip(one, other, strict=True)]  # fmt: skip
    return sum(shared) / sum(map(len, one))


def regret(model: torch.nn.Module, prompts: Sequence[list[int] | Example], answers: Sequence[list[int]]) -> float:
    """How much less likely the tokens of `answers` are on average than the likeliest, both by the model itself.

    0 for its own greedy answers, and near 0 for those of another who breaks near ties otherwise.
    """
    import torch

    gaps = []
    for prompt, answer in zip(prompts, answers, strict=True):
        whole = prompt if isinstance(prompt, Example) else _text(prompt[: _room_of(model)])
        start = len(whole.input_ids)
        for token in answer:
            whole = _followed(whole, token)
        with torch.no_grad():
            logits_TV = model(**model_inputs(whole), use_cache=False).logits[0, start - 1 : -1].float()
        chosen_T1 = torch.tensor(answer, device=logits_TV.device)[:, None]
        gaps.append(logits_TV.max(-1).values - logits_TV.gather(-1, chosen_T1)[:, 0])
    return float(torch.cat(gaps).nan_to_num(nan=float("inf")).mean())


def _answer(model: torch.nn.Module, prompt: list[int] | Example) -> list[int]:
    import torch

    so_far = prompt if isinstance(prompt, Example) else _text(prompt[: _room_of(model)])
    start = len(so_far.input_ids)
    for _ in range(GREEDY_TOKENS):
        with torch.no_grad():
            best = model(**model_inputs(so_far), use_cache=False).logits[0, -1].argmax()
        so_far = _followed(so_far, int(best))
    return so_far.input_ids[start:]


def _room_of(model: Any) -> int:
    return prompt_room(num_positions(model.config.to_dict()))


def _text(ids: list[int]) -> Example:
    return Example(ids, [0] * len(ids))


def _followed(so_far: Example, token: int) -> Example:
    """A document and a token of text behind it, which is one position further than all before it on every axis."""
    rope_AT = so_far.rope_AT
    if rope_AT is not None:
        rope_AT = np.pad(rope_AT, ((0, 0), (0, 1)), constant_values=int(rope_AT.max()) + 1)
    return replace(
        so_far, input_ids=[*so_far.input_ids, token], loss_mask=[*so_far.loss_mask, 0], rope_AT=rope_AT
    )  # fmt: skip
