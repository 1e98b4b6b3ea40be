"""The rows of an export: as long as the model has positions for, and of a file read as the job would read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayswift.config.job import DataSpec
from rayswift.errors import ConfigError
from rayswift.export import pipeline
from rayswift.export.rows import Rows, read_rows_of
from rayswift.export.source import Source
from rayswift.models.init import init_model
from rayswift.models.loading import load_tokenizer


def made(folder: Path, tiny_text: Path, positions: int) -> Path:
    """A gpt2, which has a table of its positions."""
    init_model(folder, arch="gpt2", layers=2, hidden_size=32, heads=4, vocab_size=300, max_length=positions,
               train_tokenizer_files=[tiny_text])  # fmt: skip
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def drawn(base: Path, path: Path, *, max_length: int | None = None, data: dict[str, Any] | None = None) -> Rows:
    what = Source(base=str(base), rendering="chat", data=None if data is None else DataSpec.model_validate(data))
    return read_rows_of(what, load_tokenizer(str(base)), path=str(path), num_calibration=0, num_held_out=64,
                        max_length=max_length)[1]  # fmt: skip


def test_rows_are_no_longer_than_the_model_has_positions(tmp_path: Path, tiny_text: Path) -> None:
    base = made(tmp_path / "base", tiny_text, 160)
    rows = [{"query": f"what is {i}?", "response": f"it is {i} " * (300 if i < 2 else 2)} for i in range(8)]
    path = write(tmp_path / "rows.jsonl", rows)
    found = drawn(base, path)
    assert max(len(one.input_ids) for one in found.examples) <= 160
    assert drawn(base, path, data={"train": [{"path": "other.jsonl"}], "max_length": 64}).used.num_rows > 0
    assert drawn(base, path, max_length=160).used == found.used
    with pytest.raises(ConfigError, match=r"--max-length=161 is more than the model has positions; use 160"):
        drawn(base, path, max_length=161)


def test_a_model_of_few_positions_is_proved_in_an_engine(tmp_path: Path, tiny_text: Path) -> None:
    """Prompts are cut so that an answer has positions left."""
    base = made(tmp_path / "base", tiny_text, 64)
    long = "The quick brown fox jumps over the lazy dog. " * 9
    manifest = pipeline.export(str(base), str(tmp_path / "out"), engine="local", prompts=(long, "Who?"))
    assert manifest.verify is not None
    assert manifest.verify.served is not None
    assert manifest.verify.greedy_agreement == manifest.verify.served.greedy_agreement == 1.0


def test_a_file_is_read_as_the_job_reads_its_own(tmp_path: Path, tiny_model_dir: Path) -> None:
    """With its system message, columns and tags; the file that it trains on with all that it says of it."""
    named = [{"ask": f"what is {i}?", "say": f"it is {i * 7}"} for i in range(12)]
    source = {"system": "You are brief.", "columns": {"ask": "query", "say": "response"}}
    path = write(tmp_path / "rows.jsonl", named)
    plain = write(tmp_path / "plain.jsonl", [{"query": row["ask"], "response": row["say"]} for row in named])
    silent = drawn(tiny_model_dir, plain)
    own = {"train": [{"path": str(path), "weight": 3, **source}]}
    for data in (own, {"train": [{"path": str(tmp_path / "other.jsonl"), **source}]}):
        found = drawn(tiny_model_dir, path, data=data)
        text = load_tokenizer(str(tiny_model_dir)).decode(found.examples[0].input_ids)
        assert "You are brief." in text
        assert found.used.num_rows == 12
        assert found.used.num_tokens > silent.used.num_tokens
