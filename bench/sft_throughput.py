"""Claim: `rayswift train` (one worker, packing, fp32) reaches at least 0.9 of a bare torch loop over the same packed
batches, and its first optimizer step is done at most 15 s after the process started.

    python bench/sft_throughput.py [--rounds 3] [--steps 40]

Both sides run in turn on the same machine with the same number of threads; each figure is the median over steps
after the first five of a round, and the ratio is taken round by round. Rows are made here from a fixed seed, the
model is random: only speed is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

WARMUP_STEPS = 5
VOICE = ("ba", "de", "fi", "go", "lu", "ma", "ne", "ri", "so", "tu")
WORDS = [first + second for first in VOICE for second in VOICE]


def make_rows(path: Path, num_rows: int) -> None:
    """Question/answer rows of 20 to 120 words."""
    rng = random.Random(0)
    with path.open("w") as stream:
        for number in range(num_rows):
            question = " ".join(rng.choices(WORDS, k=rng.randint(5, 30)))
            answer = " ".join(rng.choices(WORDS, k=rng.randint(15, 90)))
            stream.write(json.dumps({"query": f"{number} {question}?", "response": answer}) + "\n")


def make_job(folder: Path, name: str, steps: int) -> Path:
    """The job both sides run: 4 sequences of 512 tokens a step, two micro-batches."""
    job = {
        "name": name,
        "output": str(folder / "runs"),
        "method": {"name": "sft"},
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {"train": [{"path": str(folder / "rows.jsonl")}], "max_length": 512},
        "train": {"max_steps": steps, "epochs": 100, "global_batch_size": 4, "micro_batch_size": 2, "lr": 1e-3,
                  "save_every": None},
        "cluster": {"workers": 1, "device": "cpu"},
    }  # fmt: skip
    path = folder / f"{name}.json.yaml"
    path.write_text(json.dumps(job))
    return path


def time_rayswift(job: Path, folder: Path, name: str) -> tuple[float, float]:
    """(median steady tokens/s, seconds from process start to the first finished step) of `rayswift train`."""
    metrics = folder / "runs" / name / "metrics.jsonl"
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "rayswift.cli", "train", str(job)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    first = None
    while process.poll() is None:
        if first is None and metrics.exists() and b'"loss"' in metrics.read_bytes():
            first = time.perf_counter() - began
        time.sleep(0.05)
    assert process.stderr is not None
    if process.returncode or first is None:
        sys.exit(f"rayswift train failed: {process.stderr.read().decode()}")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return median(r["tokens_per_second"] for r in records[WARMUP_STEPS:] if "loss" in r), first


def time_bare_loop(job: Path) -> float:
    """Median steady tokens/s of a plain torch loop over the same packed batches, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--bare", str(job)], capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def bare_loop(job_file: str) -> None:
    """What a person would write by hand: model, cross entropy, backward, clip, AdamW. Prints tokens/s."""
    import torch
    import torch.nn.functional as F

    from rayswift.cluster.preflight import prepare
    from rayswift.config.load import load_job
    from rayswift.data.blocks import local_blocks, step_inputs
    from rayswift.data.ledger import Ledger
    from rayswift.models.loading import load_model, load_tokenizer

    torch.set_num_threads(1)
    prepared = prepare(load_job(job_file).job.model_copy(update={"output": tempfile.mkdtemp()}))
    job, stream = prepared.job, prepared.train_stream
    blocks = local_blocks(
        stream, load_tokenizer(job.model.path), data_rank=0, data_size=1,
        global_batch_size=job.train.global_batch_size, ledger=Ledger.start(stream.fingerprint),
    )  # fmt: skip
    steps = step_inputs(
        blocks, sequences_per_step=job.train.global_batch_size, micro_batch_size=job.train.micro_batch_size, pad_id=0
    )
    shares = [next(steps) for _ in range(job.train.max_steps or 0)]  # prepared before the clock starts
    model = load_model(job.model, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.train.lr, fused=True, weight_decay=0.0)
    rates = []
    for share in shares:
        began = time.perf_counter()
        count = sum(batch.weights_BT.sum() for batch in share.micro_batches)
        for batch in share.micro_batches:
            logits = model(input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False).logits
            losses = F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), reduction="none")
            ((losses * batch.weights_BT.flatten()).sum() / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.append(share.num_tokens / (time.perf_counter() - began))
    print(median(rates[WARMUP_STEPS:]))


def main() -> None:
    """Run the rounds and print one line each, then the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if arguments.bare:
        bare_loop(arguments.bare)
        return
    from rayswift.models.init import init_model

    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        make_rows(folder / "rows.jsonl", 6000)
        init_model(
            str(folder / "model"), arch="qwen3", layers=4, hidden_size=256, heads=8, kv_heads=4, vocab_size=4096,
            train_tokenizer_files=[str(folder / "rows.jsonl")], seed=0,
        )  # fmt: skip
        print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}", flush=True)
        ratios, starts = [], []
        for number in range(arguments.rounds):
            job = make_job(folder, f"round{number}", arguments.steps)
            bare = time_bare_loop(job)
            ours, start = time_rayswift(job, folder, f"round{number}")
            ratios.append(ours / bare)
            starts.append(start)
            print(
                f"round {number}: rayswift {ours:.0f}, bare loop {bare:.0f} tokens/s, ratio {ours / bare:.3f}, "
                f"first step after {start:.1f} s",
                flush=True,
            )
        print(
            f"median ratio {median(ratios):.3f} (claim >= 0.9), median first step {median(starts):.1f} s (claim <= 15)"
        )


if __name__ == "__main__":
    main()
