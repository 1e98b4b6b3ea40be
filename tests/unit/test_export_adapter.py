"""An adapter exported alone: the run's own, bound to its base, and served from its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rayswift.config.job import AdapterSpec
from rayswift.errors import ConfigError, ExportError
from rayswift.export.adapter import export_adapter
from rayswift.export.adapter_record import RECORD, AdapterManifest
from rayswift.models.adapter_folder import attach_adapter
from rayswift.models.adapters import BINDING, add_lora, load_base, weights_sha256
from rayswift.serving.adapters import find_adapter
from tests.export_cases import export, shake, write_run

_IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def run(tmp_path: Path, tiny_model_dir: Path) -> tuple[Path, torch.Tensor]:
    """A finished LoRA run, and what the trained model computes."""
    spec = AdapterSpec(rank=4)
    model = add_lora(load_base(str(tiny_model_dir), dtype="float32"), spec, seed=0)
    weights = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    shake(weights, 0.2)
    write_run(tmp_path / "runs/lora", tiny_model_dir, weights, spec)
    with torch.no_grad():
        return tmp_path / "runs/lora", model.eval()(input_ids=_IDS, use_cache=False).logits


def test_a_runs_adapter_comes_out_alone_and_bound(
    run: tuple[Path, torch.Tensor], tmp_path: Path, tiny_model_dir: Path
) -> None:
    out = tmp_path / "adapters/support"
    made = export_adapter(str(run[0]), str(out))
    assert made == AdapterManifest.model_validate_json((out / RECORD).read_text())
    assert made.base_sha256 == json.loads((out / BINDING).read_text())["base_sha256"] == weights_sha256(tiny_model_dir)
    assert (made.checkpoint_step, made.method, made.verify.max_abs < 1e-5) == (7, "sft", True)
    assert set(made.files) == {path.name for path in out.iterdir()} - {RECORD}
    model = attach_adapter(load_base(str(tiny_model_dir), dtype="float32"), str(out)).eval()
    with torch.no_grad():
        assert torch.allclose(model(input_ids=_IDS, use_cache=False).logits, run[1], atol=1e-5)
    assert find_adapter(tmp_path / "adapters", "support") == out.resolve()
    again = export_adapter(str(out), str(tmp_path / "again"))  # an adapter folder is a source too
    assert again.files["adapter_model.safetensors"] == made.files["adapter_model.safetensors"]
    assert export(str(out), str(tmp_path / "merged")).adapter is not None


def test_what_has_no_adapter_and_what_is_in_the_way_is_refused(
    run: tuple[Path, torch.Tensor], tmp_path: Path, tiny_model_dir: Path
) -> None:
    with pytest.raises(ConfigError, match="has no adapter"):
        export_adapter(str(tiny_model_dir), str(tmp_path / "out"))
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("x")
    for force in (False, True):
        with pytest.raises(ConfigError, match=r"exists|is not replaced"):
            export_adapter(str(run[0]), str(taken), force=force)
    export_adapter(str(run[0]), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="exists"):
        export_adapter(str(run[0]), str(tmp_path / "out"))
    export_adapter(str(run[0]), str(tmp_path / "out"), force=True)
    with pytest.raises(ConfigError, match="would overwrite"):
        export_adapter(str(tmp_path / "out"), str(tmp_path / "out"), force=True)
    with pytest.raises(ConfigError, match="lies in"):
        export_adapter(str(tmp_path / "out"), str(tmp_path / "out" / "again"))
    export_adapter(str(run[0]), str(run[0] / "adapter"))  # a run may hold what was made of it


def test_an_adapter_that_reads_back_otherwise_leaves_nothing(
    run: tuple[Path, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rayswift.export import adapter

    def with_a_wrong_weight(model: object, folder: str) -> object:
        found = attach_adapter(model, folder)  # type: ignore[arg-type]
        with torch.no_grad():
            next(value for name, value in found.named_parameters() if "lora_B" in name).add_(0.5)
        return found

    monkeypatch.setattr(adapter, "attach_adapter", with_a_wrong_weight)
    with pytest.raises(ExportError, match="did not verify") as caught:
        export_adapter(str(run[0]), str(tmp_path / "out"))
    assert caught.value.exit_code == 5
    assert not (tmp_path / "out").exists()
