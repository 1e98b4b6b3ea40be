"""Claim: raw JSONL becomes packed token batches through the Ray Data pipeline at least as fast as batched
`datasets.map(num_proc=2)` tokenizes it with the same tokenizer, on two cores; sequences of 1,024 tokens are at least
99% full on GSM8K.

    pip install --target DIR --no-deps datasets dill multiprocess xxhash
    PYTHONPATH=DIR python bench/data_throughput.py [--rows 120000] [--rounds 2]

Both sides start from the same JSONL file, render the same chat template, tokenize with the same tokenizer file and make
the loss mask of the answer; sides take turns, each in a process of its own, and what is timed begins when everything is
imported: datasets forks processes that have it, Ray starts new ones, so that a stream of 4,096 rows is read first.
How long that takes is told too; a training run spends it loading its model. What each does:
- ours: indexes and hashes the file, plans the stream, reads, checks and shuffles the rows, renders, tokenizes, masks,
  packs whole sequences, and hands every block to this process, which collates it into tensors.
- datasets: loads the JSON file into its Arrow cache, and maps with two processes and batches of 1,000:
  `apply_chat_template` for prompt and whole, one tokenizer call for prompts and one for answers, ids and mask joined.
  No packing, no shuffle, nothing is read back.
- tokenize only: datasets again, `tokenizer(texts)` on question and answer joined: no template, no mask.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.data_rows import GSM8K, gsm8k_rows, plan_of_rows, small_model

GLOBAL_BATCH = 16


def ours(folder: Path) -> dict[str, float]:
    """Seconds from the raw file to the last collated batch, and until the first; rows, and how full sequences are."""
    import ray

    from rayswift.cluster.session import configure, worker_python

    configure()
    with tempfile.TemporaryDirectory(prefix="ray-") as scratch:
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False,
            _temp_dir=scratch, runtime_env=worker_python(),
        )  # fmt: skip
        start = read_whole(folder, "first.jsonl")
        wait_for_idle_cluster()
        found = read_whole(folder, "rows.jsonl")
        ray.shutdown()
    return found | {"start_s": start["s"]}


def wait_for_idle_cluster(timeout_s: float = 30) -> None:
    """Until the processes of the stream before have gone: Ray Data keeps their share of the CPUs from the next."""
    deadline = time.monotonic() + timeout_s
    while any("SplitCoordinator" in " ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])):
        if time.monotonic() > deadline:
            sys.exit("the first stream's coordinator does not end")
        time.sleep(0.1)


def read_whole(folder: Path, name: str) -> dict[str, float]:
    """A file through the pipeline, from its raw bytes to its last collated batch."""
    from rayswift.data.blocks import step_inputs
    from rayswift.data.ledger import Ledger
    from rayswift.data.pipeline import read_shares, split_stream

    began = time.perf_counter()
    plan = plan_of_rows(folder / name)
    (split,) = split_stream(
        plan, str(folder / "model"), ledger=Ledger.start(plan.fingerprint), global_batch_size=GLOBAL_BATCH, data_size=1
    )
    blocks = read_shares(split, global_batch_size=GLOBAL_BATCH, data_size=1)
    rows = tokens = sequences = 0
    first = 0.0
    for share in step_inputs(blocks, sequences_per_step=GLOBAL_BATCH, micro_batch_size=4, pad_id=0):
        if not share.num_sequences:
            break
        first = first or time.perf_counter() - began
        rows, tokens, sequences = rows + share.num_rows, tokens + share.num_tokens, sequences + share.num_sequences
    return {
        "s": time.perf_counter() - began, "first_s": first, "rows": rows, "fill": tokens / max(1, sequences) / 1024
    }  # fmt: skip


def with_datasets(folder: Path, *, chat: bool) -> dict[str, float]:
    """Seconds from the raw file to the mapped data set."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder / "model"))
    datasets.disable_progress_bars()

    def render(batch: dict[str, list[str]]) -> dict[str, Any]:
        asked = [[{"role": "user", "content": question}] for question in batch["question"]]
        prompts = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in asked]
        wholes = [
            tokenizer.apply_chat_template([*m, {"role": "assistant", "content": answer}], tokenize=False)
            for m, answer in zip(asked, batch["answer"], strict=True)
        ]
        answers = [whole[len(prompt) :] for prompt, whole in zip(prompts, wholes, strict=True)]
        before, after = (tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in (prompts, answers))
        return {
            "input_ids": [a + b for a, b in zip(before, after, strict=True)],
            "loss_mask": [[0] * len(a) + [1] * len(b) for a, b in zip(before, after, strict=True)],
        }

    def plain(batch: dict[str, list[str]]) -> dict[str, Any]:
        texts = [f"{q}\n{a}" for q, a in zip(batch["question"], batch["answer"], strict=True)]
        return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}

    with tempfile.TemporaryDirectory(prefix="hf-") as cache:
        began = time.perf_counter()
        rows = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=cache)
        mapped = rows.map(
            render if chat else plain, batched=True, batch_size=1000, num_proc=2, remove_columns=rows.column_names
        )
        return {"s": time.perf_counter() - began, "rows": len(mapped)}


def fill_of_gsm8k(folder: Path) -> float:
    """How full sequences of 1,024 tokens are over the whole of GSM8K as it is."""
    from rayswift.data.prepare import prepare_chunk
    from rayswift.models.loading import load_tokenizer

    plan, tokenizer = plan_of_rows(GSM8K), load_tokenizer(str(folder / "model"))
    tables = [prepare_chunk(plan, index, tokenizer) for index in range(plan.num_chunks)]
    tokens = sum(len(ids) for table in tables for ids in table.column("input_ids").to_pylist())
    return tokens / sum(table.num_rows for table in tables) / 1024


def measured(folder: Path, side: str) -> dict[str, float]:
    """A side in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--side", side, "--folder", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> int:
    """Print a line for each round; 1 when a claim is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=120_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.update(
        OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", RAY_AUTH_MODE="disabled",
        RAY_USAGE_STATS_ENABLED="0",
    )  # fmt: skip
    if arguments.side:
        folder = Path(arguments.folder)
        found = ours(folder) if arguments.side == "ours" else with_datasets(folder, chat=arguments.side == "chat")
        print(json.dumps(found))
        return 0
    if find_spec("datasets") is None:
        sys.exit("needs the package datasets, which is no dependency of this project: see the command above")
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}", flush=True)
    ratios: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        gsm8k_rows(folder / "rows.jsonl", arguments.rows)
        gsm8k_rows(folder / "first.jsonl", 4096)
        small_model(folder / "model")
        for number in range(arguments.rounds):
            sides = {side: measured(folder, side) for side in ("ours", "chat", "tokenize")}
            rates = {side: one["rows"] / one["s"] for side, one in sides.items()}
            ratios.append(rates["ours"] / rates["chat"])
            print(
                f"round {number}: ours {rates['ours']:.0f} rows/s ({sides['ours']['rows']:.0f} rows, first batch after "
                f"{sides['ours']['first_s']:.1f} s, {sides['ours']['fill']:.2%} full; start of Ray's processes "
                f"{sides['ours']['start_s']:.1f} s before), datasets {rates['chat']:.0f}, "
                f"datasets tokenize only {rates['tokenize']:.0f}; ratio {ratios[-1]:.2f}, to tokenize only "
                f"{rates['ours'] / rates['tokenize']:.2f}",
                flush=True,
            )
        fill = fill_of_gsm8k(folder)
    print(f"median ratio {median(ratios):.2f} (claim >= 1); GSM8K fills 1,024 to {fill:.2%} (claim >= 99%)")
    return 0 if median(ratios) >= 1 and fill >= 0.99 else 1


if __name__ == "__main__":
    sys.exit(main())
