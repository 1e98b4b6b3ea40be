"""What is made of an export, or of an adapter that was exported alone, tells of the training that it came from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayswift.config.job import AdapterSpec
from rayswift.errors import ConfigError, ExportError
from rayswift.export.adapter import export_adapter
from rayswift.export.adapter_record import RECORD, AdapterManifest
from rayswift.export.card import CARD
from rayswift.export.manifest import MANIFEST, ExportManifest, read, read_valid
from rayswift.export.terms import QuantizeSpec
from rayswift.models.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BINDING,
    add_lora,
    load_base,
    save_adapter,
    weights_sha256,
)
from rayswift.serving.lineage import lineage_of
from rayswift.serving.versions import version_of
from rayswift.serving.vllm.adapters import _bases
from tests.export_cases import export, shake, write_run

SPEC = AdapterSpec(rank=4)


@pytest.fixture
def run(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A finished LoRA run."""
    model = add_lora(load_base(str(tiny_model_dir), dtype="float32"), SPEC, seed=0)
    weights = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    shake(weights, 0.2)
    write_run(tmp_path / "runs/lora", tiny_model_dir, weights, SPEC)
    return tmp_path / "runs/lora"


def training_of(made: ExportManifest | AdapterManifest) -> tuple[object, ...]:
    return made.method, made.job_hash, made.checkpoint_step, made.run_finished, made.lineage


def test_a_merged_adapter_tells_of_the_run_that_trained_it(tmp_path: Path, run: Path) -> None:
    alone = export_adapter(str(run), str(tmp_path / "adapter"))
    again = export_adapter(str(tmp_path / "adapter"), str(tmp_path / "again"))
    merged = export(str(tmp_path / "again"), str(tmp_path / "out"))
    direct = export(str(run), str(tmp_path / "direct"))
    assert direct.lineage is not None
    assert training_of(merged) == training_of(direct)
    assert training_of(again) == training_of(alone) == training_of(direct)
    assert direct.adapter is not None
    assert merged.adapter == {**direct.adapter, "folder": str(tmp_path / "again")}
    card = (tmp_path / "out" / CARD).read_text()
    assert f"Fine-tuned from `{direct.base}`" in card
    assert "sft, with a lora adapter of rank 4, merged" in card
    assert "| step | 7 |" in card


def test_an_export_of_an_export_tells_of_its_training_and_names_it(
    tmp_path: Path, run: Path, tiny_model_dir: Path
) -> None:
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    rows = tmp_path / "held_out.jsonl"
    rows.write_text("".join(json.dumps({"query": f"say {i}", "response": f"{i}"}) + "\n" for i in range(20)))
    made = export(str(run), str(first))
    copy = export(str(first), str(second))
    small = export(str(second), str(third), quantize=QuantizeSpec("fp8", calibration=str(rows)))
    assert training_of(copy) == training_of(small) == training_of(made)
    assert (copy.adapter, small.adapter) == (made.adapter, made.adapter)
    assert small == read_valid(third)
    assert small.earlier is not None
    assert small.earlier.model_dump() == {
        "folder": str(second), "version": version_of(second), "quantizer": "none", "base": str(tiny_model_dir),
        "base_sha256": weights_sha256(tiny_model_dir),
    }  # fmt: skip
    card = (third / CARD).read_text()
    version = version_of(second)
    assert f"Quantized by fp8 from the export `{second}` (version `{version}`), fine-tuned from `{made.base}`" in card
    assert f"| export | `{second}`, version `{version}`, sha256 of its weights `{small.base_sha256}` |" in card
    assert f"| base | `{made.base}`, sha256 of its weights `{made.base_sha256}` |" in card
    assert f"A copy of the export `{first}`" in (second / CARD).read_text()
    export(str(third), str(tmp_path / "fourth"))
    fourth = (tmp_path / "fourth" / CARD).read_text()
    assert f"sha256 of its weights `{weights_sha256(third)}`, which fp8 had rounded |" in fourth
    told = lineage_of(third)
    assert told is not None
    assert (told["base"], told["base_sha256"], told["method"]) == ("tiny", made.base_sha256, "sft")


def test_adapters_of_an_export_are_served_beside_other_forms_of_it(
    tmp_path: Path, run: Path, tiny_model_dir: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    export(str(run), str(first), verify=False)
    export(str(first), str(second), verify=False, dtype="bfloat16")
    assert _bases(str(second)) == {weights_sha256(first), weights_sha256(second)}
    assert weights_sha256(tiny_model_dir) not in _bases(str(first))


def test_a_copy_of_what_was_not_trained_claims_no_training(tmp_path: Path, tiny_model_dir: Path) -> None:
    export(str(tiny_model_dir), str(tmp_path / "first"), verify=False)
    made = export(str(tmp_path / "first"), str(tmp_path / "second"), verify=False)
    assert training_of(made) == (None, None, None, None, None)
    said = f"A copy of the export `{tmp_path / 'first'}` (version `{version_of(tmp_path / 'first')}`), of "
    assert said + f"`{tiny_model_dir}`, exported by" in (tmp_path / "second" / CARD).read_text()


def test_a_manifest_from_before_has_no_earlier_export(tmp_path: Path, tiny_model_dir: Path) -> None:
    export(str(tiny_model_dir), str(tmp_path / "out"), verify=False)
    old = json.loads((tmp_path / "out" / MANIFEST).read_text())
    del old["earlier"]
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(old))
    assert read(tmp_path / "out").earlier is None


def _changed(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values())).add_(0.1)


def _short(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]


def _long(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in list(tensors.items()):
        tensors[name.replace(".layers.1.", ".layers.7.")] = tensor.clone()


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("into", ["model", "adapter"])
def test_an_adapter_that_was_changed_since_it_was_exported_is_refused(tmp_path: Path, run: Path, into: str) -> None:
    export_adapter(str(run), str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "notes.txt").write_text("nothing of an adapter")
    make: Any = export if into == "model" else export_adapter
    make(str(tmp_path / "adapter"), str(tmp_path / "out"))
    change_weights(tmp_path / "adapter", _changed)
    with pytest.raises(ExportError, match=rf"has {ADAPTER_WEIGHTS} with another sha256 than its manifest"):
        make(str(tmp_path / "adapter"), str(tmp_path / "other"))
    (tmp_path / "adapter" / ADAPTER_CONFIG).write_text("{}")
    with pytest.raises(ExportError, match=rf"has {ADAPTER_CONFIG} with 2 bytes"):
        make(str(tmp_path / "adapter"), str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("change", "rule"), [(_short, "lacks 14 tensors"), (_long, "has no layers for 14 tensors")])
def test_tensors_that_are_not_those_of_the_adapters_settings_are_refused(
    tmp_path: Path, tiny_model_dir: Path, change: Callable[[dict[str, torch.Tensor]], None], rule: str
) -> None:
    """peft fills in fresh ones for those that are missing, with a warning, and drops the others without."""
    model = add_lora(load_base(str(tiny_model_dir)), SPEC, seed=0)
    save_adapter(model, tmp_path / "adapter", base=str(tiny_model_dir))
    change_weights(tmp_path / "adapter", change)
    with pytest.raises(ConfigError, match=rf"adapter=.* {rule}, among them .*; copy the whole folder again"):
        export(str(tmp_path / "adapter"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("embeddings", [False, True])
def test_a_folder_that_peft_wrote_is_merged_as_it_was(tmp_path: Path, tiny_model_dir: Path, embeddings: bool) -> None:
    """Of which only the base is known, as somebody wrote it down; peft may have kept the embeddings in it."""
    from peft import LoraConfig, get_peft_model

    base, folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "base")), tmp_path / "adapter"
    model = get_peft_model(load_base(str(base), dtype="float32"), LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    trained = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    shake(trained | ({"embed": model.get_input_embeddings().weight} if embeddings else {}), 0.2)
    model.save_pretrained(str(folder), save_embedding_layers=embeddings)
    (folder / BINDING).write_text(json.dumps({"base": str(base), "base_sha256": weights_sha256(base)}))
    made = export(str(folder), str(tmp_path / "out"))
    assert not (folder / RECORD).exists()
    assert (made.method, made.lineage, made.adapter) == (None, None, {"name": "lora", "folder": str(folder)})
    ids_BT = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        expected = model.eval()(input_ids=ids_BT, use_cache=False).logits
        found = load_base(str(tmp_path / "out"), dtype="float32").eval()(input_ids=ids_BT, use_cache=False).logits
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*(lora_bias|lora_B.bias|tie_word_embeddings)")  # what peft says of it
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"target_modules": ["q_proj"], "lora_bias": True},
            r"adapter cannot be merged: Impossible to merge LoRA.*bias",
        ),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            "adapter is on embeddings that are tied to the output head, and cannot be merged",
        ),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_told_why(
    tmp_path: Path, tiny_model_dir: Path, settings: dict[str, Any], said: str
) -> None:
    from peft import LoraConfig, get_peft_model

    folder = tmp_path / "adapter"
    model = get_peft_model(load_base(str(tiny_model_dir), dtype="float32"), LoraConfig(r=2, **settings))
    shake({name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}, 0.2)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    binding = {"base": str(tiny_model_dir), "base_sha256": weights_sha256(tiny_model_dir)}
    (folder / BINDING).write_text(json.dumps(binding))
    with pytest.raises(ExportError, match=said):
        export(str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
