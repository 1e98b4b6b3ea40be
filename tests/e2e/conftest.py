"""What the command-line suites share: the command as a user runs it, and a small model for the examples."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Rayswift = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def rayswift(root: Path) -> Rayswift:
    """Runs `rayswift ARGS...` from the checkout and returns what it printed; fails after `timeout` seconds."""

    def call(*args: str, timeout: float = 240, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "rayswift.cli", *args],
            cwd=root, capture_output=True, text=True, timeout=timeout, check=False, env=env or os.environ,
        )  # fmt: skip

    return call


@pytest.fixture(scope="session")
def example_model(rayswift: Rayswift, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that the head of examples/sft.yaml tells how to make."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    made = rayswift(
        "model", "init", str(folder), "--layers", "2", "--hidden-size", "64", "--heads", "4", "--kv-heads", "2",
        "--vocab-size", "512", "--train-tokenizer", "examples/data/prose.txt", "examples/data/questions.jsonl",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return folder
