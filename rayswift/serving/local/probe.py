"""What engine `local` makes of a folder, for an export: as `serving/vllm/probe.py` says it of vLLM, in this process.

Asks the model and the decode loop that replicas have. That what the loop computes from its cache is what a full pass
computes is proved when they are opened (`proof.py`); here it is asked what it says.
Shape legend: T positions of a prompt, V vocabulary.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rayswift.errors import ConfigError, RaySwiftError, ServeError
from rayswift.export.shown import shown
from rayswift.models.loading import load_tokenizer
from rayswift.serving.engine import Delta, EngineOptions, Prompt, Request, Sampling
from rayswift.serving.engines.local import Opened, open_folder
from rayswift.serving.local.batch import Prefill, open_batch
from rayswift.serving.local.loop import DecodeLoop, Vocabulary
from rayswift.serving.local.precision import memory_left
from rayswift.serving.local.proof import joined
from rayswift.serving.prompts import PromptBuilder
from rayswift.units import format_bytes

SPEED_CONCURRENCY, SPEED_TOKENS = 8, 64
_MOST_S = 20.0
"""For eight answers: a large model on a CPU says how fast it is long before they end."""
_WARM_UP_TOKENS = 2
_MOST_OF_MEMORY = 0.8
"""Of that which is left: answers need some too."""


@dataclass(frozen=True)
class Speed:
    """How fast a model came and answered; `tokens_per_second` are those of eight answers at a time."""

    load_s: float
    first_token_s: float
    tokens_per_second: float
    dtype: str
    device: str


def answers_of(folder: str, questions: Mapping[str, Any]) -> dict[str, Any]:
    """The `logprobs` of the tokens of each prompt behind its first, and the `greedy` tokens behind each.

    Of the texts in `prompts`, and then of a question about each kind of medium that the engine takes; keys as those of
    vLLM's probe. Raises ConfigError for a model that this engine does not serve.
    """
    opened, load_s = _opened(folder)
    asked = shown(opened.media_encoder)
    prompts = [Prompt(tuple(ids)) for ids in questions["prompts"]]
    texts = tuple(prompts)
    prompts += [Prompt(tuple(one.input_ids), one.media, one.rope_AT) for one in asked.values()]
    tokenizer = load_tokenizer(folder)
    speed = _speed(opened, texts, load_s)
    return {
        "logprobs": [score(opened, prompt) for prompt in prompts],
        "greedy": greedy(opened, prompts, questions["max_new_tokens"]),
        "shown": {kind: one.input_ids for kind, one in asked.items()},
        "chat": PromptBuilder(tokenizer).turns(questions["chat"]) if questions["chat"] else None,
        "version": version("transformers"),
        "load_s": speed.load_s,
        "first_token_s": speed.first_token_s,
        "tokens_per_second": speed.tokens_per_second,
        "dtype": speed.dtype,
        "device": speed.device,
    }


def speed_of(
    folder: str,
    prompts: Sequence[Sequence[int]],
    dtype: str = "auto",
    trained: Mapping[str, torch.Tensor] | None = None,
) -> Speed:
    """How fast this engine loads a folder and answers prompts of ids, in `dtype`, with `trained` weights in its place.

    Every answer has so many tokens, whatever ends a turn, so that two models have the same to do. Raises ConfigError
    for a model that this engine does not serve.
    """
    opened, load_s = _opened(folder, dtype, trained)
    return _speed(opened, [Prompt(tuple(ids)) for ids in prompts], load_s)


@torch.inference_mode()
def score(opened: Opened, prompt: Prompt) -> list[float]:
    """The log-probability of each token of a prompt but its first, given those before it."""
    inputs = Prefill(opened.model, prompt, None, _num_axes(opened)).inputs(slice(None))
    logits_TV = opened.model(**inputs, use_cache=False).logits[0, :-1].float()
    tokens_T1 = torch.tensor(prompt.ids[1:], device=logits_TV.device)[:, None]
    found: list[float] = torch.log_softmax(logits_TV, -1).gather(-1, tokens_T1)[:, 0].tolist()
    return found


@torch.inference_mode()
def greedy(opened: Opened, prompts: Sequence[Prompt], num_tokens: int) -> list[list[int]]:
    """The likeliest tokens behind each prompt, one after the other, ends of turns among them; all in one batch."""
    num_axes = _num_axes(opened)
    batch = open_batch(opened.model, num_axes)
    newest = [int(joined(batch, opened.model, prompt, num_axes).argmax()) for prompt in prompts]
    answers = [[token] for token in newest]
    for _ in range(num_tokens - 1):
        newest = batch.decode(newest).argmax(-1).tolist()
        for answer, token in zip(answers, newest, strict=True):
            answer.append(token)
    return answers


def _opened(
    folder: str, dtype: str = "auto", trained: Mapping[str, torch.Tensor] | None = None
) -> tuple[Opened, float]:
    _check_room(folder, dtype, trained)
    started = time.perf_counter()
    opened = open_folder(folder, EngineOptions(max_concurrency=SPEED_CONCURRENCY, dtype=dtype), trained)
    return opened, time.perf_counter() - started


def _check_room(folder: str, dtype: str, trained: Mapping[str, torch.Tensor] | None) -> None:
    """Raises ConfigError where the model does not fit beside what an export holds: Linux would end the process."""
    if torch.accelerator.is_available():
        return  # which says so itself, by an error
    if trained is None:
        needed = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    else:
        item_bytes = (getattr(torch, dtype) if dtype != "auto" else torch.float32).itemsize
        needed = sum(tensor.numel() for tensor in trained.values()) * item_bytes
    room = int(_MOST_OF_MEMORY * memory_left())
    if needed > room:
        raise ConfigError(
            f"takes {format_bytes(needed)} beside the model that is exported, and {format_bytes(room)} may be taken",
            path="engine",
            value="local",
            fix="export it on a machine with more memory",
        )


def _num_axes(opened: Opened) -> int:
    return opened.media_encoder.num_axes if opened.media_encoder else 0


def _speed(opened: Opened, prompts: Sequence[Prompt], load_s: float) -> Speed:
    endless = Vocabulary(lambda _: "", frozenset())
    loop = DecodeLoop(opened.model, endless, SPEED_CONCURRENCY, _num_axes(opened))
    loop.start()
    try:
        room = min(SPEED_TOKENS, opened.max_model_len - max(len(prompt.ids) for prompt in prompts))
        _answered(loop, prompts[:1], min(_WARM_UP_TOKENS, room))
        _, first_token_s = _answered(loop, [max(prompts, key=lambda prompt: len(prompt.ids))], 1)
        several = [prompts[number % len(prompts)] for number in range(SPEED_CONCURRENCY)]
        num_tokens, seconds = _answered(loop, several, room)
    finally:
        loop.close()
    dtype, device = str(opened.model.dtype).removeprefix("torch."), opened.model.device.type
    return Speed(load_s, first_token_s, num_tokens / seconds, dtype, device)


def _answered(loop: DecodeLoop, prompts: Sequence[Prompt], num_tokens: int) -> tuple[int, float]:
    """How many tokens were generated, and in how many seconds: all of them, or those until `_MOST_S`, one at least."""
    events: queue.SimpleQueue[Delta | RaySwiftError] = queue.SimpleQueue()
    into: Callable[[Delta | RaySwiftError], None] = events.put
    sampling, started = Sampling(max_new_tokens=num_tokens, temperature=0), time.perf_counter()
    tickets = [loop.submit(Request(f"speed-{number}", prompt, sampling), into) for number, prompt in enumerate(prompts)]
    found, running, seconds = 0, len(tickets), 0.0
    while running and (seconds < _MOST_S or not found):
        event = events.get()
        if isinstance(event, RaySwiftError):
            raise ServeError(f"failed: {event}", path="engine", value="local") from event
        found, seconds = found + event.num_tokens, time.perf_counter() - started
        running -= event.finish_reason is not None
    for ticket in tickets:
        loop.abort(ticket)
    return found, seconds
