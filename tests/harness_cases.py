"""Small tasks for the lm-evaluation-harness on files of this machine: nothing is fetched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

QUESTIONS = ("Two?", "What does str.upper do?", "Who are you", "x " * 40, "Name a class", "Is it so?", "A", "The end")
CHOICES = (" yes", " no, it is not", " a string")


def write_task(folder: Path, name: str, rows: Sequence[dict[str, Any]], **config: Any) -> None:
    """A task `name` over the rows, with what else its YAML file is to say."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    whole = {
        "task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", "doc_to_text": "{{q}}",
        "metadata": {"version": 1.5}, **config,
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole))


def write_choice(folder: Path, gold: Sequence[int]) -> None:
    """`own_choice`: one of `CHOICES` is right for each of `QUESTIONS`."""
    rows = [{"q": question, "gold": right} for question, right in zip(QUESTIONS, gold, strict=True)]
    write_task(
        folder, "own_choice", rows, output_type="multiple_choice", doc_to_choice=list(CHOICES),
        doc_to_target="{{gold}}", metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )  # fmt: skip


def write_likely(folder: Path) -> None:
    """`own_likely`: how likely the second of `CHOICES` is after each of `QUESTIONS`."""
    rows = [{"q": question} for question in QUESTIONS]
    write_task(
        folder, "own_likely", rows, output_type="loglikelihood", doc_to_target=CHOICES[1],
        metric_list=[{"metric": "perplexity"}, {"metric": "acc"}],
    )  # fmt: skip


def write_answer(folder: Path, expected: Sequence[str], *, name: str = "own_answer", **config: Any) -> None:
    """`own_answer`: a text of at most twelve tokens to each of `QUESTIONS`, or as many as there are expected."""
    rows = [{"q": question, "a": answer} for question, answer in zip(QUESTIONS, expected, strict=False)]
    settings = {"generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12}, **config}
    write_task(
        folder, name, rows, output_type="generate_until", doc_to_target="a",
        metric_list=[{"metric": "exact_match"}], **settings,
    )  # fmt: skip
