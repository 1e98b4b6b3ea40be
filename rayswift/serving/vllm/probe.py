"""What vLLM makes of a folder: `python -m rayswift.serving.vllm.probe FOLDER OUT`, in the serving environment.

Asks the very engine that replicas run. The questions come as JSON on stdin, the answers go to the file OUT, because
vLLM writes to stdout.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rayswift.export.shown import shown
from rayswift.models.loading import load_tokenizer
from rayswift.serving.engine import Delta, EngineOptions, Prompt, Request, Sampling
from rayswift.serving.engines.vllm import Vllm
from rayswift.serving.prompts import PromptBuilder
from rayswift.serving.vllm.room import room_for, sizes_of

SPEED_CONCURRENCY, SPEED_TOKENS = 8, 64


async def answers_of(folder: str, questions: dict[str, Any]) -> dict[str, Any]:
    """The `logprobs` of the tokens of each prompt behind its first, and the `greedy` tokens behind each.

    Of the texts in `prompts`, and then of a question about each kind of medium that the engine takes: `shown` has the
    ids that a server makes of those, as `chat` has of a conversation. Also how long loading took, how long the first
    token of an answer alone, and tokens per second of eight answers at a time.
    """
    options = EngineOptions(max_concurrency=SPEED_CONCURRENCY, max_model_len=questions["max_model_len"])
    engine = Vllm(folder, replace(options, **_room(folder)))
    started = time.perf_counter()
    try:
        await engine.start()
        loaded_s = time.perf_counter() - started
        limit, asked = questions["max_new_tokens"], shown(engine.media_encoder)
        prompts = [Prompt(tuple(ids)) for ids in questions["prompts"]]
        prompts += [Prompt(tuple(one.input_ids), one.media, one.rope_AT) for one in asked.values()]
        tokenizer = load_tokenizer(folder)
        chat = PromptBuilder(tokenizer).turns(questions["chat"]) if questions["chat"] else None
        return {
            "logprobs": [await engine.score(prompt) for prompt in prompts],
            "greedy": [await engine.greedy(prompt, limit) for prompt in prompts],
            "shown": {kind: one.input_ids for kind, one in asked.items()},
            "chat": chat,
            "version": version("vllm"),
            "load_s": loaded_s,
            "first_token_s": await _first_token(engine, max(prompts, key=lambda prompt: len(prompt.ids))),
            "tokens_per_second": await _speed(engine, prompts),
        }
    finally:
        await engine.close()


def _room(folder: str) -> dict[str, Any]:
    """The GPUs to ask it on: others may be at work on them, and not every model fits on one."""
    import torch

    if not torch.cuda.is_available():
        return {}
    free_of = [torch.cuda.mem_get_info(number) for number in range(torch.cuda.device_count())]
    found = room_for(*sizes_of(folder), free_of)
    return {**asdict(found), "tensor_parallel": len(found.device_ids)}


async def _first_token(engine: Vllm, prompt: Prompt) -> float:
    """Seconds until an answer to one prompt begins."""
    started = time.perf_counter()
    async for _ in engine.generate(Request("first-token", prompt, Sampling(max_new_tokens=1, temperature=0))):
        break
    return time.perf_counter() - started


async def _speed(engine: Vllm, prompts: Sequence[Prompt]) -> float:
    """Tokens per second of `SPEED_CONCURRENCY` greedy answers at a time."""

    async def answer(number: int) -> int:
        sampling = Sampling(max_new_tokens=SPEED_TOKENS, temperature=0)
        request = Request(f"speed-{number}", prompts[number % len(prompts)], sampling)
        deltas: list[Delta] = [delta async for delta in engine.generate(request)]
        return sum(delta.num_tokens for delta in deltas)

    started = time.perf_counter()
    counts = await asyncio.gather(*(answer(number) for number in range(SPEED_CONCURRENCY)))
    return sum(counts) / (time.perf_counter() - started)


if __name__ == "__main__":
    found = asyncio.run(answers_of(sys.argv[1], json.load(sys.stdin)))
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")
