"""The model card says what the manifest, the run and its evaluations say, and nothing that nobody measured."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from rayswift.data.stream_json import stream_json
from rayswift.export.card import CARD, CURVES, card_of
from rayswift.export.manifest import Evaluation, read_valid
from rayswift.export.terms import QuantizeSpec
from rayswift.training import checkpoint
from tests.data_cases import plan_of
from tests.export_cases import export, write_lora_run

LEDGER = {"fingerprint": "f" * 64, "chunk": -1, "sequence": 0, "rows_visited": 9, "rows_trained": 8,
          "rows_quarantined": 1, "tokens": 77}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A LoRA run with a ledger, the plan of its stream, a loss curve, and two evaluations, one of another step."""
    folder = tmp_path / "runs" / "lora"
    write_lora_run(folder, tiny_model_dir, 0.1)
    file = folder / checkpoint.folder_name(7) / checkpoint.MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | {"ledger": LEDGER}))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "a", "response": "b"}\n')
    (folder / "stream.json").write_text(stream_json(plan_of(rows)))
    (folder / "curves.png").write_bytes(b"\x89PNG picture")
    for name, step, loss in (("eval-held.json", 7, 0.1234), ("eval-old.json", 6, 9.9)):
        report = {"target": {"step": step}, "loss": loss, "perplexity": 1.13, "answers": {"exact_match": 0.5},
                  "rows": {"used": 3, "files": [{"path": "/x/held.jsonl"}]}}  # fmt: skip
        (folder / name).write_text(json.dumps(report))
    return folder


def test_a_run_is_described_with_curve_and_evaluation(tmp_path: Path, run: Path) -> None:
    out = tmp_path / "out"
    made = export(str(run), str(out))
    card = (out / CARD).read_text()
    assert read_valid(out) == made
    assert {CARD, CURVES} <= set(made.files)
    assert (out / CURVES).read_bytes() == (run / "curves.png").read_bytes()
    assert made.lineage is not None
    assert made.lineage.ledger_sha256 == hashlib.sha256(json.dumps(LEDGER, sort_keys=True).encode()).hexdigest()
    rows = tmp_path / "rows.jsonl"
    assert made.lineage.data == {str(rows): hashlib.sha256(rows.read_bytes()).hexdigest()}
    assert made.lineage.job["name"] == "lora"
    for said in (
        "# out", "sft, with a lora adapter of rank 4, merged", "| step | 7 |", "8 trained on, 1 quarantined",
        "| tokens | 77 |", f"![loss]({CURVES})", "| `held.jsonl` (3) | 0.1234 | 1.13 | 0.5 | - |",
        made.lineage.ledger_sha256,
        made.base_sha256, "gives the ids that were trained on",
    ):  # fmt: skip
        assert said in card, said
    assert "9.9" not in card  # an evaluation of another step
    assert "Quantization" not in card


def test_fractions_of_answers_say_of_how_many(run: Path, tmp_path: Path) -> None:
    answers = {"exact_match": 0.05, "num_answered": 100, "accuracy": 1.0, "num_judged": 5}
    report = json.loads((run / "eval-held.json").read_text()) | {"answers": answers}
    (run / "eval-held.json").write_text(json.dumps(report))
    made = export(str(run), str(tmp_path / "out"), verify=False)
    assert "| 0.05 (100 answered) | 1 (5 judged) |" in (tmp_path / "out" / CARD).read_text()
    (found,) = made.evaluations
    assert (found.num_answered, found.num_judged) == (100, 5)
    older = found.model_dump(mode="json", exclude={"num_answered", "num_judged"})
    card = card_of(made.model_copy(update={"evaluations": (Evaluation.model_validate(older),)}), "a", has_curves=False)
    assert "| 0.05 | 1 |" in card


def test_a_folder_without_a_run_claims_none(tmp_path: Path, tiny_model_dir: Path) -> None:
    export(str(tiny_model_dir), str(tmp_path / "out"), verify=False)
    card = (tmp_path / "out" / CARD).read_text()
    assert "A copy of" in card
    assert "Verification was switched off." in card
    assert not [word for word in ("Training", "Evaluation", "step", "ledger", "| method") if word in card]


def test_a_quantized_model_says_what_it_cost(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"query": f"say {i}", "response": f"{i}"}) + "\n" for i in range(20)))
    made = export(str(tiny_model_dir), str(tmp_path / "out"), quantize=QuantizeSpec("fp8", calibration=str(rows)))
    assert made.verify is not None
    assert made.verify.held_out is not None
    card = (tmp_path / "out" / CARD).read_text()
    assert "| weights | fp8, beside bfloat16 |" in card
    assert f"x{made.verify.held_out.perplexity_ratio:.4f} (bound 1.02)" in card
    assert r"`re:(.*\.)?lm_head$`" in card
