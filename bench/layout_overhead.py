"""Claim: on one process an optimizer step of the fsdp2 engine takes at most 1.05 of a bare torch loop's.

    python bench/layout_overhead.py [--rounds 5] [--steps 12]

The same model, batches, precision and AdamW everywhere, one thread per process. In each round an engine takes its steps
after the bare loop, and the ratio is taken round by round; the median over rounds is the figure. On more than
one process the ranks share this machine's cores, so those ratios hold the price of the layout (collectives, padding,
bubbles) and of sharing; their work is that of the bare loop, not more, so 1.0 would be perfect on cores enough.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
WARMUP_STEPS = 3
SEQUENCES, LENGTH, MICRO_BATCHES = 4, 512, 2
HIDDEN, LAYERS, VOCAB = 256, 4, 4096


def layouts() -> dict[str, tuple[str, Any, dict[str, Any]]]:
    """Name -> engine, layout, settings."""
    from rayswift.planning.layout import Layout

    return {
        "fsdp2, one process": ("fsdp2", Layout(), {}),
        "fsdp2, ddp 2": ("fsdp2", Layout(dp_replicate=2), {}),
        "fsdp2, fsdp 2": ("fsdp2", Layout(dp_shard=2), {}),
        "fsdp2, tp 2": ("fsdp2", Layout(tp=2), {}),
        "fsdp2, cp 2": ("fsdp2", Layout(cp=2), {}),
        "pipeline, pp 2": ("pipeline", Layout(pp=2), {}),
        "deepspeed, ZeRO-2, one process": ("deepspeed", Layout(), {"parallel.zero_stage": 2}),
        "deepspeed, ZeRO-2 on 2": ("deepspeed", Layout(dp_shard=2), {"parallel.zero_stage": 2}),
        "deepspeed, ZeRO-3 on 2": ("deepspeed", Layout(dp_shard=2), {"parallel.zero_stage": 3}),
    }


def make_model() -> Any:
    """A Qwen3 of about 5 million random parameters."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=4, head_dim=HIDDEN // 8, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def make_batches(step: int, data_rank: int, data_size: int) -> list[Any]:
    """This data rank's micro-batches of a step: packed documents of 64 tokens."""
    import numpy as np

    from rayswift.data.collate import PackedSequence, collate

    random = np.random.default_rng(step)
    whole = [
        PackedSequence(random.integers(3, VOCAB, LENGTH), np.ones(LENGTH, dtype=np.int64), [64] * (LENGTH // 64))
        for _ in range(SEQUENCES)
    ]
    mine = whole[data_rank::data_size]
    return [collate(mine[part::MICRO_BATCHES], pad_id=0) for part in range(min(MICRO_BATCHES, len(mine)))]


def bare_times(rank: int, steps: int) -> list[float]:
    """Seconds per step of what a person would write by hand."""
    import torch
    import torch.nn.functional as F

    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    times = []
    for step in range(steps):
        batches = make_batches(step, 0, 1)
        began = time.perf_counter()
        count = sum(batch.weights_BT.sum() for batch in batches)
        for batch in batches:
            logits = model(input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False).logits
            losses = F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), reduction="none")
            ((losses * batch.weights_BT.flatten()).sum() / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    return times[WARMUP_STEPS:]


def engine_times(rank: int, steps: int, name: str) -> list[float]:
    """Seconds per step of an engine, everything between two steps of the loop included."""
    import torch

    from rayswift import plugins
    from rayswift.methods.sft import Sft
    from rayswift.planning.layout import Seat
    from tests.job_cases import make_job

    os.environ["LOCAL_RANK"] = str(rank)  # as Ray Train sets it
    engine_name, layout, settings = layouts()[name]
    job = make_job(**({"train.lr": 1e-4, "train.optimizer": "adamw"} | settings))
    seat = Seat(layout, rank)
    engine = plugins.load("parallel.engines", engine_name)(make_model(), job, seat, torch.device("cpu"))
    method, times = Sft(Sft.Config()), []
    for step in range(steps):
        batches = make_batches(step, seat.data_rank, seat.data_size)
        began = time.perf_counter()
        count = engine.sum_over_data([sum(float(method.count(batch)) for batch in batches)])[0]
        engine.optimizer_step(engine.forward_backward(batches, method, count), 1e-4)
        times.append(time.perf_counter() - began)
    return times[WARMUP_STEPS:]


def main() -> int:
    """Run the rounds, print a line for each engine; 1 when the claim is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    from tests.ranks.forked import run_ranks

    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}", flush=True)
    found = {}
    for name, (_, layout, _) in layouts().items():
        ratios = []
        for _ in range(arguments.rounds):
            bare = median(run_ranks(bare_times, 1, arguments.steps)[0])
            ours = run_ranks(engine_times, layout.world_size, arguments.steps, name)
            ratios.append(max(median(times) for times in ours) / bare)
        found[name] = median(ratios)
        rounds = " ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"{name:32} {found[name]:.3f} of the bare loop ({rounds})", flush=True)
    return 0 if found["fsdp2, one process"] <= 1.05 else 1


if __name__ == "__main__":
    sys.exit(main())
