"""Claim: on one process an optimizer step of the fsdp2 engine takes at most 1.05 of a bare torch loop's.

    python bench/layout_overhead.py [--rounds 3] [--steps 20]

The same model, batches, precision and AdamW everywhere, one thread per process. A step of the engine follows a step of
the bare loop in the same process, and their ratio is taken; a round is the median over steps, the figure the median
over rounds. Two ranks share the work on two cores, so of them 0.5 would be perfect: what is above is the price of the
layout (collectives, padding, bubbles) and of whatever else the machine does.
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


def bare_loop() -> Any:
    """A function that takes one step of what a person would write by hand."""
    import torch
    import torch.nn.functional as F

    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)

    def step(number: int) -> None:
        batches = make_batches(number, 0, 1)
        count = sum(batch.weights_BT.sum() for batch in batches)
        for batch in batches:
            logits = model(input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False).logits
            losses = F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), reduction="none")
            ((losses * batch.weights_BT.flatten()).sum() / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def engine_loop(rank: int, name: str) -> Any:
    """A function that takes one step of an engine, counting over ranks included, as the training loop does."""
    import torch

    from rayswift import plugins
    from rayswift.methods.sft import Sft
    from rayswift.planning.layout import Seat
    from tests.job_cases import make_job

    engine_name, layout, settings = layouts()[name]
    job = make_job(**({"train.lr": 1e-4, "train.optimizer": "adamw"} | settings))
    seat = Seat(layout, rank)
    engine = plugins.load("parallel.engines", engine_name)(make_model(), job, seat, torch.device("cpu"))
    method = Sft(Sft.Config())

    def step(number: int) -> None:
        batches = make_batches(number, seat.data_rank, seat.data_size)
        count = engine.sum_over_data([sum(float(method.count(batch)) for batch in batches)])[0]
        engine.optimizer_step(engine.forward_backward(batches, method, count), 1e-4)

    return step


def paired_ratios(rank: int, steps: int, name: str) -> list[float]:
    """Time of the engine's step over that of the bare step just before it, which rank 0 takes while others wait."""
    import torch.distributed as dist

    bare, ours = bare_loop(), engine_loop(rank, name)
    ratios = []
    for number in range(steps):
        dist.barrier()
        began = time.perf_counter()
        if rank == 0:
            bare(number)
        dist.barrier()
        between = time.perf_counter()
        ours(number)
        dist.barrier()
        ratios.append((time.perf_counter() - between) / (between - began))
    return ratios[WARMUP_STEPS:]


def main() -> int:
    """Run the rounds, print a line for each engine; 1 when the claim is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    from tests.ranks.forked import run_ranks

    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}", flush=True)
    found = {}
    for name, (_, layout, _) in layouts().items():
        rounds = [
            median(run_ranks(paired_ratios, layout.world_size, arguments.steps, name)[0])
            for _ in range(arguments.rounds)
        ]
        found[name] = median(rounds)
        shown = " ".join(f"{ratio:.3f}" for ratio in rounds)
        print(f"{name:32} {found[name]:.3f} of the bare loop ({shown})", flush=True)
    return 0 if found["fsdp2, one process"] <= 1.05 else 1


if __name__ == "__main__":
    sys.exit(main())
