"""A serving engine as a judge of an export: what it says is compared, bounded and written down."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from rayswift.errors import ConfigError, ExportError
from rayswift.export import pipeline, served
from rayswift.export.manifest import read_valid
from rayswift.export.served import Prover

_DYING = """#!/bin/sh
echo "(EngineCore pid=7) ERROR 11-25 17:44:06 [core.py:1512] RuntimeError: Worker failed: no such kernel" >&2
echo "rayswift.errors.ServeError: engine=vllm look into the log" >&2
exit 1
"""
_BY = Prover("vllm", sys.executable, 1e-3)


def _ask(by: Prover, folder: str, prompts: list[list[int]], chat: Any, off: dict[str, Any]) -> dict[str, Any]:
    """Stands for vLLM: says what transformers says, changed as `off` asks."""
    import torch

    from rayswift.export.judge import greedy_of
    from rayswift.models.adapters import load_base
    from rayswift.models.loading import load_tokenizer
    from rayswift.serving.prompts import PromptBuilder

    model, scores = load_base(str(folder), dtype="float32").eval(), []
    for ids in prompts:
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
        scores.append([float(logprobs[at, token]) + off.get("logprobs", 0) for at, token in enumerate(ids[1:])])
    asked = PromptBuilder(load_tokenizer(str(folder))).turns(chat[0]) + off.get("chat", [])
    return {"logprobs": scores, "greedy": greedy_of(model, prompts), "chat": asked, "version": "1.2", "load_s": 1.5,
            "tokens_per_second": 100.0}  # fmt: skip


@pytest.fixture
def off(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the engine is to say otherwise; an export that asks for it is judged by it."""
    changes: dict[str, Any] = {}
    monkeypatch.setattr(pipeline, "prover", lambda *_, **__: (_BY, None))
    monkeypatch.setattr(served, "_ask", lambda *args: _ask(*args, changes))
    return changes


def test_an_engine_that_says_the_same_is_written_down(
    off: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    pipeline.export(str(tiny_model_dir), str(tmp_path / "out"), engine="vllm")
    manifest = read_valid(tmp_path / "out")
    assert manifest.verify is not None
    said = manifest.verify.served
    assert said is not None
    assert (said.engine, said.version, said.greedy_agreement, said.template_equal) == ("vllm", "1.2", 1.0, True)
    assert said.mean_abs <= said.max_abs < 1e-5
    assert said.num_positions > 100
    assert "vllm 1.2" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"logprobs": 0.01}, "log-probabilities differ by 0.01"),
        ({"logprobs": float("nan")}, "log-probabilities differ by inf"),
        ({"chat": [1]}, "makes other token ids of a chat"),
    ],
)
def test_an_engine_that_says_something_else_leaves_no_export(
    off: dict[str, Any], change: dict[str, Any], told: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    off.update(change)
    with pytest.raises(ExportError, match=told) as caught:
        pipeline.export(str(tiny_model_dir), str(tmp_path / "out"), engine="vllm")
    assert caught.value.exit_code == 5
    assert not (tmp_path / "out").exists()


def test_an_engine_that_dies_is_told_by_what_its_core_said(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(_DYING)
    python.chmod(0o755)
    with pytest.raises(ExportError, match="vllm cannot serve it: RuntimeError: Worker failed: no such kernel"):
        served.prove(Prover("vllm", str(python), 1e-3), tmp_path, [[1, 2]], None, [], [])


def test_where_no_engine_is_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayswift.serving.environment._PLACE", tmp_path / "absent")
    monkeypatch.delenv("RAYSWIFT_SERVE_PYTHON", raising=False)
    found, note = served.prover("auto", tmp_path, 1e-3)
    assert found is None
    assert note is not None
    assert "make serve-env" in note
    assert served.prover("none", tmp_path, 1e-3) == (None, None)
    with pytest.raises(ConfigError, match="cannot prove this export"):
        served.prover("vllm", tmp_path, 1e-3)
    with pytest.raises(ConfigError, match="none of auto"):
        served.prover("sglang", tmp_path, 1e-3)
