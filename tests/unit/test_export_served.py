"""A serving engine as a judge of an export: what it says is compared, bounded and written down."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from rayswift.data.media.features import model_inputs
from rayswift.data.types import Example
from rayswift.errors import ConfigError, ExportError
from rayswift.export import pipeline, served
from rayswift.export.manifest import read_valid
from rayswift.export.served import Prover, Questions
from rayswift.export.shown import encoder_of, shown
from rayswift.serving import environment
from rayswift.serving.environment import Interpreter
from tests.multimodal_models import make

_DYING = """#!/bin/sh
echo "(EngineCore pid=7) ERROR 11-25 17:44:06 [core.py:1512] RuntimeError: Worker failed: no such kernel" >&2
echo "rayswift.errors.ServeError: engine=vllm look into the log" >&2
exit 1
"""
_BY = Prover("vllm", sys.executable, 1e-3)
_AUTO = Prover("vllm", sys.executable, 1e-3, is_asked=False)
_LOCAL = Prover("local", sys.executable, 1e-3, is_asked=False)


def _ask(by: Prover, folder: str, asked: Questions, off: dict[str, Any]) -> dict[str, Any]:
    """Stands for vLLM: says what transformers says, changed as `off` asks."""
    import torch

    from rayswift.export.greedy import greedy_of
    from rayswift.models.adapters import load_base
    from rayswift.models.loading import load_tokenizer
    from rayswift.serving.prompts import PromptBuilder

    model, scores = load_base(str(folder), dtype="float32").eval(), []
    seen = shown(None if off.get("blind") else encoder_of(folder))
    prompts = [*asked.prompts, *seen.values()]
    for prompt in prompts:
        one = prompt if isinstance(prompt, Example) else Example(prompt, [0] * len(prompt))
        with torch.no_grad():
            logprobs = torch.log_softmax(model(**model_inputs(one)).logits[0].float(), -1)
        moved = off.get("logprobs", 0) + (off.get("media", 0) if one.media else 0)
        scores.append([float(logprobs[at, token]) + moved for at, token in enumerate(one.input_ids[1:])])
    assert asked.chat is not None
    chat = PromptBuilder(load_tokenizer(str(folder))).turns(asked.chat[0]) + off.get("chat", [])
    greedy = [
        [token if not off.get("greedy") else (token + off["greedy"]) % 100 for token in answer]
        for answer in greedy_of(model, prompts)
    ]
    return {"logprobs": scores, "greedy": greedy, "chat": chat, "version": "1.2", "load_s": 1.5, "first_token_s": 0.01,
            "tokens_per_second": 100.0, "shown": {kind: one.input_ids for kind, one in seen.items()}}  # fmt: skip


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
    assert said.greedy_regret is not None
    assert 0 <= said.greedy_regret < 1e-5
    assert said.num_positions > 100
    assert "vllm 1.2" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"logprobs": 0.01}, "log-probabilities differ by 0.01"),
        ({"logprobs": float("nan")}, "log-probabilities differ by inf"),
        ({"greedy": 1}, "greedy tokens are less likely than transformers' likeliest, by 0"),
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


@pytest.mark.parametrize(("asked", "bound"), [(0.0, 0.0), (0.5, 0.5), (None, served.ENGINE_BOUNDS["bfloat16"])])
def test_a_bound_of_nothing_is_a_bound(tiny_model_dir: Path, asked: float | None, bound: float) -> None:
    by = pipeline._prover("local", tiny_model_dir, asked, None, "bfloat16", None)
    assert by is not None
    assert by.bound == bound


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen2_5_vl", tmp_path_factory.mktemp("served") / "eyes")


def test_a_model_of_images_is_shown_one(off: dict[str, Any], eyes: Path, tmp_path: Path) -> None:
    pipeline.export(str(eyes), str(tmp_path / "out"), engine="vllm")
    verify = read_valid(tmp_path / "out").verify
    assert verify is not None
    said = verify.served
    assert said is not None
    assert (verify.media, said.media_equal, said.greedy_agreement) == (("image",), True, 1.0)
    assert said.max_abs < 1e-5
    assert said.num_positions == verify.num_positions - verify.num_prompts


@pytest.mark.parametrize(
    ("change", "told"),
    [({"media": 0.1}, "log-probabilities differ by"), ({"blind": True}, "other token ids of a prompt with media")],
)
def test_an_engine_that_sees_otherwise_leaves_no_export(
    off: dict[str, Any], change: dict[str, Any], told: str, eyes: Path, tmp_path: Path
) -> None:
    off.update(change)
    with pytest.raises(ExportError, match=told):
        pipeline.export(str(eyes), str(tmp_path / "out"), engine="vllm")
    assert not (tmp_path / "out").exists()


def test_who_cannot_be_shown_images_is_not_asked(eyes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = Interpreter(sys.executable)
    monkeypatch.setattr(served, "interpreter_of", lambda *_: python)
    monkeypatch.setattr(environment, "_versions", lambda _, name: {name: "0.28.0"})
    monkeypatch.setattr(served, "has_gpu", lambda: True)
    encoder = encoder_of(eyes)
    assert served.prover("auto", eyes, 1e-3, encoder=encoder) == (_AUTO, None)
    assert served.prover("vllm", eyes, 1e-3, encoder=encoder) == (Prover("vllm", python.path, 1e-3), None)
    other = make("smolvlm", tmp_path / "other")
    for folder, seen, told in ((other, encoder, "text alone of a model of type smolvlm"), (eyes, None, "processor")):
        found, note = served.prover("auto", folder, 1e-3, encoder=seen)
        assert found == _LOCAL
        assert told in (note or "")
        with pytest.raises(ConfigError, match=told):
            served.prover("vllm", folder, 1e-3, encoder=seen)
    monkeypatch.setattr(environment, "_versions", lambda _, name: {name: None})
    assert "has no torchvision" in (served.prover("auto", eyes, 1e-3, encoder=encoder)[1] or "")


def test_heads_without_a_kernel_on_a_cpu_are_told(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Interpreter(sys.executable, version="0.32.0+cpu")]
    monkeypatch.setattr(served, "interpreter_of", lambda *_: found[0])
    monkeypatch.setattr(served, "has_gpu", lambda: False)
    note = "proved in engine local, not in vLLM: vLLM's attention on a CPU has no kernel for heads of 8"
    assert served.prover("auto", tiny_model_dir, 1e-3) == (_LOCAL, note)
    monkeypatch.setattr(served, "has_gpu", lambda: True)
    assert served.prover("auto", tiny_model_dir, 1e-3) == (_LOCAL, note)  # a build for CPUs on a machine with a GPU
    found[0] = Interpreter(sys.executable, version="0.32.0")
    assert served.prover("auto", tiny_model_dir, 1e-3) == (_AUTO, None)
    monkeypatch.setattr(served, "has_gpu", lambda: False)
    assert "there is no GPU here, and vllm 0.32.0 is a build for them" in str(
        served.prover("auto", tiny_model_dir, 1)[1]
    )


def test_an_engine_that_dies_is_told_by_what_its_core_said(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(_DYING)
    python.chmod(0o755)
    with pytest.raises(ExportError, match="vllm cannot serve it: RuntimeError: Worker failed: no such kernel"):
        served.prove(Prover("vllm", str(python), 1e-3), tmp_path, Questions([[1, 2]]), [], [], lambda _: 0.0)


@pytest.mark.parametrize(
    "said",
    [
        "(EngineCore pid=7) ERROR 11-25 17:44:06 [x.py:1] ValueError: Free memory on device cuda:0 (9.1/79.2 GiB)",
        "(Worker_TP1 pid=7) ERROR 11-25 17:44:06 [x.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried to",
        "rayswift.errors.ConfigError: export weights of 140.0 GiB fit in no free GPU memory here (free: 79.0 GiB)",
    ],
)
def test_who_has_no_memory_for_it_has_proved_nothing_against_it(
    tmp_path: Path, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    python.chmod(0o755)
    given: Any = (tmp_path, Questions([[1, 2]]), [], [], lambda _: 0.0)
    found, why_not = served.prove(Prover("vllm", str(python), 1e-3, is_asked=False), *given)
    assert found is None
    assert "emory" in (why_not or "")
    assert "note: not proved in a serving engine: --engine=vllm" in capsys.readouterr().err
    with pytest.raises(ExportError, match=r"vllm cannot serve it.*emory"):
        served.prove(Prover("vllm", str(python), 1e-3), *given)


def test_where_no_engine_is_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayswift.serving.environment._PLACE", tmp_path / "absent")
    monkeypatch.delenv("RAYSWIFT_SERVE_PYTHON", raising=False)
    found, note = served.prover("auto", tmp_path, 1e-3)
    assert found == _LOCAL
    assert note is not None
    assert note.startswith("proved in engine local, not in vLLM: ")
    assert "make serve-env" in note
    assert served.prover("local", tmp_path, 1e-3) == (Prover("local", sys.executable, 1e-3), None)
    assert served.prover("none", tmp_path, 1e-3) == (None, None)
    with pytest.raises(ConfigError, match="cannot prove this export"):
        served.prover("vllm", tmp_path, 1e-3)
    with pytest.raises(ConfigError, match="none of auto"):
        served.prover("sglang", tmp_path, 1e-3)
