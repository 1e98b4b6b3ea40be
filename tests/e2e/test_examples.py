"""Every job in examples/ runs as shipped, as a user would run it, and leaves the run directory that was promised."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.ray]

Rayswift = Callable[..., subprocess.CompletedProcess[str]]
PROMISED = {"job.yaml", "plan.json", "metrics.jsonl", "curves.png", "report.json", "report.md", "checkpoints"}


@pytest.mark.parametrize(
    "example", ["sft", *(pytest.param(name, marks=pytest.mark.long) for name in ("sft-lora", "pretrain"))]
)
def test_an_example_runs(rayswift: Rayswift, example_model: Path, tmp_path: Path, example: str) -> None:
    runs = tmp_path / "runs with space"
    done = rayswift("train", f"examples/{example}.yaml", f"model.path={example_model}", f"output={runs}", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (folder,) = runs.iterdir()
    assert {path.name for path in folder.iterdir()} >= PROMISED
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in metrics if "loss" in record]
    assert len(losses) == report["steps"]
    assert losses[-1] < losses[0]
    assert report["final_loss"] == losses[-1]
    if example == "sft-lora":
        exported = rayswift("export", str(folder), str(tmp_path / "export"), "--json")
        assert exported.returncode == 0, exported.stderr
        manifest = json.loads(exported.stdout)
        assert manifest["verify"]["tokenizer_equal"]
        assert (tmp_path / "export" / "model.safetensors").is_file()


def test_examples_and_their_list_agree(root: Path) -> None:
    assert {path.stem for path in (root / "examples").glob("*.yaml")} == {"sft", "sft-lora", "pretrain"}
