"""Claim: a run's check of itself takes a second or two, and tells a leak from rounding in every precision.

    python bench/self_check.py [--keep]

First every architecture of tests/architecture_cases.py in each precision: how far the loss of the worst document
moves when it is packed, as `refuse_other_losses` sees it; those that the planner refuses to pack are brought past it.
Then the time of the whole check of a run on one process, of models of growing size.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DTYPES = ("float32", "float16", "bfloat16")
SIZES = {"0.1M": (2, 32, 4), "4M": (4, 256, 4), "32M": (8, 512, 8), "113M": (12, 768, 12)}


def differences(dtype: str) -> tuple[dict[str, float], dict[str, float]]:
    """Architecture -> the largest difference of a document's loss, relative where it is over 1, of those that can be
    packed, and of those that cannot."""
    import numpy as np
    import torch

    from rayswift import plugins
    from rayswift.planning.layout import Layout, Seat
    from rayswift.training import self_check
    from tests.architecture_cases import ARCHITECTURES, VOCAB_SIZE, tiny_architecture
    from tests.architecture_cells import Column, refused
    from tests.job_cases import make_job

    random = np.random.default_rng(0)
    documents = [self_check.plain(random.integers(3, VOCAB_SIZE, length)) for length in (20, 31, 12, 25, 18, 28)]
    job = make_job(**{"model.dtype": dtype})
    found: tuple[dict[str, float], dict[str, float]] = {}, {}
    for name in ARCHITECTURES:
        engine = plugins.load("parallel.engines", "fsdp2")(
            tiny_architecture(name), job, Seat(Layout()), torch.device("cpu")
        )
        alone = self_check._losses(engine, [[document] for document in documents], documents)
        packed = self_check._losses(engine, [documents[::2], documents[1::2]], documents)
        worst = float((np.abs(packed - alone) / np.maximum(1, alone)).max())
        found[refused(name, Column(Layout(), packing=True)) is not None][name] = worst
    return found


def seconds(folder: Path, size: tuple[int, int, int]) -> dict[str, Any]:
    """What a run of one step records of its check."""
    from rayswift.models.init import init_model
    from rayswift.training.run_dir import RunDir
    from tests.data_cases import pairs, write_jsonl
    from tests.ranks.test_run import order_of, train

    layers, hidden, heads = size
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(f"{row['question']} {row['answer']}" for row in pairs(2000)))
    init_model(
        str(folder / "model"), layers=layers, hidden_size=hidden, heads=heads, kv_heads=heads // 2,
        vocab_size=500 if hidden < 100 else 32_000, train_tokenizer_files=[str(corpus)], seed=0,
    )  # fmt: skip
    rows = write_jsonl(folder / "rows.jsonl", pairs(40, words=60))
    settings: dict[str, Any] = {"data.eval": [], "train.eval_every": None, "train.max_steps": 1, "data.max_length": 512}
    order = order_of("bench", folder, folder / "model", rows, ranks=1, **settings)
    train(order)
    events = RunDir(order.job.run_dir).read_jsonl("events.jsonl")
    return dict(next(event for event in events if event["event"] == "self_check"))


def report() -> list[str]:
    """The lines of both tables."""
    lines = ["largest difference of a document's loss, relative where the loss is over 1", ""]
    for dtype in DTYPES:
        packs, leaks = differences(dtype)
        worst, least = max(packs, key=packs.__getitem__), min(leaks, key=leaks.__getitem__)
        lines.append(
            f"{dtype:10}{len(packs)} that can be packed: at most {packs[worst]:.1e} ({worst});  "
            f"{len(leaks)} that cannot: at least {leaks[least]:.1e} ({least})"
        )
    lines += ["", "time of the whole check on one process of one thread, float32", ""]
    for name, size in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            found = seconds(Path(folder), size)
        lines.append(
            f"{name:>6} parameters: {found['seconds']:.2f} s for {found['num_documents']} documents and "
            f"{found['num_prompts']} prompts; losses differ by {found['difference']:.1e}"
        )
    return lines


def main() -> None:
    """Measure, show, keep if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1")
    sys.path.insert(0, str(ROOT))  # models and rows are shared with the test suite
    from tests.evidence import header, kept

    text = "\n".join([*header(), "", *report()]) + "\n"
    print(text)
    if arguments.keep:
        kept("self_check").write_text(text)


if __name__ == "__main__":
    main()
