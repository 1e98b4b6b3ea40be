"""Engine `local` at concurrency 8 against `generate` one request at a time, on the same model in the same process.

    python bench/serve_local.py [--rounds 3] [--threads 2] [--dtype float32]

Claim: at least 5x the tokens per second at concurrency 8. What bounds it is how much faster eight rows go through a
linear layer together than one by one, see rayswift/serving/local/packing.py. `generate` runs the checkpoint as stored.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from serve_overhead import make_model

_REQUESTS, _CONCURRENCY, _PROMPT_TOKENS, _NEW_TOKENS = 24, 8, 32, 64


def prompts() -> list[list[int]]:
    import random

    draw = random.Random(0)
    return [[draw.randrange(300, 4000) for _ in range(_PROMPT_TOKENS)] for _ in range(_REQUESTS)]


async def local(engine: object) -> float:
    """Tokens per second of all requests, eight at a time."""
    from rayswift.serving.engine import Prompt, Request, Sampling

    queue, counts = iter(enumerate(prompts())), list[int]()

    async def work() -> None:
        for number, prompt in queue:
            request = Request(str(number), Prompt(tuple(prompt)), Sampling(_NEW_TOKENS, temperature=0))
            counts.append(sum([delta.num_tokens async for delta in engine.generate(request)]))  # type: ignore[attr-defined]

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(_CONCURRENCY)))
    return sum(counts) / (time.perf_counter() - started)


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run in a thread that ends, and with it the threads that torch shares out to: no more than cores may be left."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(work, *arguments).result()


def one_at_a_time(model: object) -> float:
    """Tokens per second of transformers' generate, a request after the other."""
    import torch

    started, count = time.perf_counter(), 0
    for prompt in prompts():
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=_NEW_TOKENS, do_sample=False)  # type: ignore[attr-defined]
        count += made.shape[1] - len(prompt)
    return count / (time.perf_counter() - started)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    import torch

    from rayswift.models.adapters import load_base
    from rayswift.serving.engine import EngineOptions
    from rayswift.serving.engines.local import Local

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="rayswift-bench-") as place:
        folder = Path(place) / "model"
        alone(make_model, folder, args.hidden, args.layers)
        engine = Local(str(folder), EngineOptions(_CONCURRENCY, max_model_len=512, dtype=args.dtype))
        model = alone(load_base, str(folder))
        model.eval().config.use_cache = True
        await engine.start()
        await local(engine), alone(one_at_a_time, model)
        ratios = []
        for _ in range(args.rounds):
            ours, theirs = await local(engine), alone(one_at_a_time, model)
            ratios.append(ours / theirs)
            print(f"local at concurrency {_CONCURRENCY}: {ours:.0f} tokens/s, generate one at a time: {theirs:.0f}")
        print(f"x{statistics.median(ratios):.2f} (worst {min(ratios):.2f}, best {max(ratios):.2f})")
        await engine.close()


if __name__ == "__main__":
    asyncio.run(main())
