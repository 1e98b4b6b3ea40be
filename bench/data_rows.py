"""What the benches of the data path share: many varied rows, a plan over them, a small model. Measures nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GSM8K = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "gsm8k" / "train.jsonl"


def gsm8k_rows(path: Path, num_rows: int) -> None:
    """The 7,473 questions of GSM8K again and again, each time with another number before question and answer."""
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as stream:
        for number in range(num_rows):
            row = rows[number % len(rows)]
            varied = {"question": f"{number}. {row['question']}", "answer": f"({number % 97}) {row['answer']}"}
            stream.write(json.dumps(varied) + "\n")


def small_model(folder: Path) -> None:
    """A random model whose tokenizer, of 4,096 tokens and with a chat template, was trained on GSM8K."""
    from rayswift.models.init import init_model

    init_model(
        str(folder), arch="qwen3", layers=2, hidden_size=64, heads=4, kv_heads=2, vocab_size=4096,
        train_tokenizer_files=[str(GSM8K)], seed=0,
    )  # fmt: skip


def plan_of_rows(path: Path, **data: Any) -> Any:
    """The stream over one file as a job with `data` would have it: packed into 1,024 tokens, shuffled."""
    from rayswift.config.job import DataSource, DataSpec
    from rayswift.data.inspect import open_sources

    sources = (DataSource(path=str(path)),)
    return open_sources(sources).stream(DataSpec(train=sources, **data), "chat")
