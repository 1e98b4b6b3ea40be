"""An adapter trained on a base in 4 bits is merged into what these bits stand for, not into the base as stored."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rayswift.config.job import AdapterSpec, ModelSpec
from rayswift.errors import ConfigError
from rayswift.evaluation.target import load, opened
from rayswift.export.adapter import export_adapter
from rayswift.export.card import CARD
from rayswift.export.manifest import MANIFEST, read, read_valid
from rayswift.export.source import resolve
from rayswift.models.adapters import BINDING, add_lora, load_adapter_state, load_base
from rayswift.models.init import init_model
from rayswift.models.loading import load_model
from tests.export_cases import export, shake, write_run

IDS_BT = torch.arange(5, 45)[None]
SPEC = AdapterSpec(rank=4)


def logprobs(model: Any) -> torch.Tensor:
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # bitsandbytes has another kernel for evaluation, but not everywhere
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS_BT, use_cache=False).logits
    return torch.log_softmax(logits.float(), dim=-1)


def exported(folder: Path) -> torch.Tensor:
    return logprobs(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def make_run(run: Path, base: Path, dtype: str = "float32", **model: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A finished run; what it says as it was trained, and what its adapter says on the base as it is stored."""
    trained: Any = load_model(ModelSpec(path=str(base), dtype=dtype, **model), dtype=getattr(torch, dtype))  # type: ignore[arg-type]
    trained = add_lora(trained, SPEC, seed=0)
    weights = {name: tensor for name, tensor in trained.state_dict().items() if "lora_" in name}
    shake(weights, 0.05)
    write_run(run, base, weights, SPEC, dtype=dtype, **model)
    stored = add_lora(load_base(str(base), dtype="float32"), SPEC, seed=0)
    load_adapter_state(stored, weights)
    return logprobs(trained), logprobs(stored)


@pytest.mark.parametrize("arch", ["qwen3", "gpt2", "mixtral"])
def test_what_was_trained_on_four_bits_is_exported(tmp_path: Path, tiny_text: Path, arch: str) -> None:
    """gpt2 stores matrices transposed, which packing turns around; mixtral's experts are not packed."""
    base = tmp_path / "base"
    init_model(
        str(base), arch=arch, layers=2, hidden_size=32, heads=4, vocab_size=300, train_tokenizer_files=[str(tiny_text)],
        extra={"num_local_experts": 4} if arch == "mixtral" else {},
    )  # fmt: skip
    trained, stored = make_run(tmp_path / "run", base, quantization="nf4")
    manifest = export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert gap(exported(tmp_path / "out"), trained) < 1e-4
    assert gap(exported(tmp_path / "out"), stored) > 1e-2
    assert manifest == read_valid(tmp_path / "out")
    assert manifest.lineage is not None
    assert manifest.lineage.base_quantization == "nf4"
    assert manifest.merge is not None
    assert 0 < manifest.merge.max_abs < 1e-4
    assert "| base in training | packed as nf4" in (tmp_path / "out" / CARD).read_text()
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_packing_in_half_precision_is_that_of_training(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Training then rounds activations, too: what is left is that, and not what packing costs."""
    trained, stored = make_run(tmp_path / "run", tiny_model_dir, "bfloat16", quantization="nf4")
    manifest = export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert gap(exported(tmp_path / "out"), trained) < 0.3 * gap(stored, trained)
    assert manifest.merge is not None
    assert 0 < manifest.merge.max_abs < 1e-4


def test_what_was_trained_on_four_bits_is_evaluated(tmp_path: Path, tiny_model_dir: Path) -> None:
    trained, stored = make_run(tmp_path / "run", tiny_model_dir, quantization="nf4")
    source, kind = opened(str(tmp_path / "run"))
    model = load(source)[0].cpu()
    assert kind == "run"
    assert gap(logprobs(model), trained) < 1e-4
    assert gap(logprobs(model), stored) > 1e-2


def test_an_adapter_on_the_base_as_stored_is_merged_into_that(tmp_path: Path, tiny_model_dir: Path) -> None:
    trained, stored = make_run(tmp_path / "run", tiny_model_dir)
    manifest = export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert torch.equal(trained, stored)
    assert gap(exported(tmp_path / "out"), stored) < 1e-4
    assert manifest.lineage is not None
    assert manifest.lineage.base_quantization is None
    assert "base in training" not in (tmp_path / "out" / CARD).read_text()


def test_a_manifest_from_before_is_read(tmp_path: Path, tiny_model_dir: Path) -> None:
    make_run(tmp_path / "run", tiny_model_dir)
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    old = json.loads((tmp_path / "out" / MANIFEST).read_text())
    del old["lineage"]["base_quantization"]
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(old))
    lineage = read(tmp_path / "out").lineage
    assert lineage is not None
    assert lineage.base_quantization is None


def test_an_adapter_alone_says_what_it_was_trained_on(tmp_path: Path, tiny_model_dir: Path) -> None:
    """So that its folder, or one made of that, is merged into the same."""
    trained, _ = make_run(tmp_path / "run", tiny_model_dir, quantization="nf4")
    made = export_adapter(str(tmp_path / "run"), str(tmp_path / "adapter"))
    assert made.lineage is not None
    assert made.lineage.base_quantization == "nf4"
    export_adapter(str(tmp_path / "adapter"), str(tmp_path / "again"))
    manifest = export(str(tmp_path / "again"), str(tmp_path / "out"))
    assert gap(exported(tmp_path / "out"), trained) < 1e-4
    assert manifest.adapter is not None
    assert manifest.adapter["base_quantization"] == "nf4"
    file = tmp_path / "again" / BINDING
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization": "nf2"}))
    with pytest.raises(ConfigError, match="packs its base as nf2 in float32, which is unknown here"):
        export(str(tmp_path / "again"), str(tmp_path / "other"))
    assert "| base in training | packed as nf4" in (tmp_path / "out" / CARD).read_text()


def test_without_bitsandbytes_it_is_refused(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run", tiny_model_dir, quantization="nf4")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    with pytest.raises(ConfigError, match=r"model\.quantization=nf4 needs bitsandbytes, which is not installed"):
        export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert resolve(str(tmp_path / "run")).packed is not None
