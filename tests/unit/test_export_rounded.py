"""What merging and rounding cost on rows of the job, for an export that is not quantized: recorded, bounded, told."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rayswift import api, cli
from rayswift.data.stream_json import stream_json
from rayswift.errors import ConfigError, ExportError
from rayswift.export.judge import said_of
from rayswift.export.manifest import ExportManifest, read_valid
from rayswift.export.measured import HeldOut
from rayswift.export.rows import NUM_HELD_OUT, Rows, choose
from rayswift.export.source import resolve
from rayswift.models.loading import load_tokenizer
from rayswift.training import checkpoint
from tests.data_cases import plan_of
from tests.export_cases import export, write_lora_run

torch.set_num_threads(1)


@pytest.fixture
def run(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A LoRA run whose job holds 20 rows out."""
    folder = tmp_path / "runs" / "lora"
    write_lora_run(folder, tiny_model_dir, 0.2)
    rows = write_rows(tmp_path / "held_out.jsonl", 20)
    train = write_rows(tmp_path / "train.jsonl", 30, start=100)
    with_data(folder, eval=[{"path": str(rows)}], train=[{"path": str(train)}])
    (folder / "stream.json").write_text(stream_json(plan_of(train)))
    return folder


def write_rows(path: Path, count: int, start: int = 0) -> Path:
    lines = [{"query": f"what does {i} print?", "response": f"it prints {i * 7} and {i}"}
             for i in range(start, start + count)]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def with_data(run: Path, **data: object) -> None:
    """The run as if its job had said so of its data."""
    file = run / checkpoint.folder_name(7) / checkpoint.MANIFEST
    record = json.loads(file.read_text())
    record["job"]["data"] |= data
    file.write_text(json.dumps(record))


def held_out_of(manifest: ExportManifest) -> HeldOut:
    assert manifest.verify is not None
    assert manifest.verify.held_out is not None
    return manifest.verify.held_out


def rows_of(run: Path, base: Path) -> Rows:
    found = choose(resolve(str(run)), load_tokenizer(str(base)), None, needs_rows=False, num_held_out=None,
                   is_bounded=False).held_out  # fmt: skip
    assert found is not None
    return found


def test_the_perplexity_of_a_rounded_export_is_recorded_beside_the_trained_models(
    run: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", str(run), str(out), "--dtype", "bfloat16", "--engine", "none"])
    told = capsys.readouterr()
    assert caught.value.code == 0, told.err
    made = read_valid(out)
    found = held_out_of(made)
    assert (found.rows.num_rows, found.trained_on, made.quantization) == (NUM_HELD_OUT, False, None)
    assert found.rows.files.keys() == {str(tmp_path / "held_out.jsonl")}
    written = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert found.loss == pytest.approx(said_of(written, rows_of(run, tiny_model_dir).examples).loss, abs=1e-5)
    assert found.loss != found.reference_loss
    assert found.perplexity_ratio == pytest.approx(math.exp(found.loss - found.reference_loss))
    assert 0.98 < found.perplexity_ratio < found.bound_perplexity_ratio == 1.02
    assert f"bfloat16: perplexity x{found.perplexity_ratio:.4f} on 16 held-out rows" in told.out
    card = (out / "README.md").read_text()
    assert f"| loss on 16 held-out rows | {found.reference_loss:.4f} before, {found.loss:.4f} after |" in card
    assert f"| perplexity | x{found.perplexity_ratio:.4f} (bound 1.02) |" in card


def test_in_float32_nothing_is_lost_and_the_bound_is_narrow(run: Path, tmp_path: Path) -> None:
    found = held_out_of(export(str(run), str(tmp_path / "out")))
    assert found.perplexity_ratio == pytest.approx(1, abs=1e-4)
    assert found.bound_perplexity_ratio == 1.001


def test_a_bound_that_is_not_kept_leaves_no_export(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"perplexity on 4 held-out rows is .* of the trained model's \(bound 0\.5\)"
    ) as caught:
        api.export(str(run), str(tmp_path / "out"), engine="none", max_perplexity=0.5, num_held_out=4)
    assert caught.value.exit_code == 5
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("held_out", [None, "train.jsonl"])
def test_rows_of_the_training_data_are_told_to_be_such(run: Path, tmp_path: Path, held_out: str | None) -> None:
    """Also where the job names them as held out."""
    with_data(run, eval=[{"path": str(tmp_path / held_out)}] if held_out else [])
    found = held_out_of(export(str(run), str(tmp_path / "out"), num_held_out=5))
    assert (found.rows.num_rows, found.trained_on) == (5, True)
    assert "| loss on 5 rows of the training data |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("name", "said"), [("train", "rows of the training data"), ("held_out", "held-out rows")])
def test_rows_named_for_a_calibration_are_told_to_be_what_they_are(
    run: Path, tmp_path: Path, name: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy of the training data as well as its own file: by its sha256."""
    rows = tmp_path / "rows.jsonl"
    shutil.copyfile(tmp_path / f"{name}.jsonl", rows)
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", str(run), str(tmp_path / "out"), "--quantizer", "fp8", "--engine", "none",
                  "--calibration", str(rows), "--held-out-rows", "5", "--min-agreement", "0"])  # fmt: skip
    told = capsys.readouterr()
    assert caught.value.code == 0, told.err
    assert f" on 5 {said}, the same most likely token" in told.out
    assert f"| loss on 5 {said} |" in (tmp_path / "out" / "README.md").read_text()


def test_rows_that_are_gone_are_told_and_missed_only_where_they_were_asked_for(
    run: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "held_out.jsonl").unlink()
    made = export(str(run), str(tmp_path / "out"))
    assert made.verify is not None
    assert made.verify.held_out is None
    assert "held_out.jsonl" in (made.verify.held_out_reason or "")
    assert f"note: perplexity is not compared: {made.verify.held_out_reason}" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="cannot be read again"):
        export(str(run), str(tmp_path / "other"), max_perplexity=1.1)
    with pytest.raises(ConfigError, match="does not say which rows it was trained on"):
        export(str(tiny_model_dir), str(tmp_path / "other"), max_perplexity=1.1)
    plain = export(str(tiny_model_dir), str(tmp_path / "plain")).verify
    assert plain is not None
    assert (plain.held_out, plain.held_out_reason) == (None, None)
