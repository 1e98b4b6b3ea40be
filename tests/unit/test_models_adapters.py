"""An adapter is seeded, starts as nothing, survives saving, and merges only into the weights it was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rayswift.config.job import AdapterSpec
from rayswift.errors import ConfigError
from rayswift.models.adapter_folder import merge_adapter
from rayswift.models.adapters import (
    BINDING,
    adapter_state,
    add_lora,
    linear_layers,
    load_adapter_state,
    load_base,
    save_adapter,
    weights_sha256,
)
from rayswift.models.init import init_model

IDS_BT = torch.tensor([[5, 6, 7, 8, 9]])


def trained(folder: Path, spec: AdapterSpec | None = None) -> torch.nn.Module:
    """The model of a folder with an adapter that does something."""
    model = add_lora(load_base(str(folder)), spec or AdapterSpec(rank=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    for tensor in adapter_state(model).values():
        tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model(input_ids=IDS_BT, use_cache=False).logits
    assert isinstance(found, torch.Tensor)
    return found


def test_fresh_adapter_is_seeded_float32_and_changes_nothing(tiny_model_dir: Path) -> None:
    base = load_base(str(tiny_model_dir), dtype="bfloat16")
    before = logits(base)
    one = add_lora(base, AdapterSpec(rank=4), seed=3)
    assert torch.equal(logits(one), before)
    again = add_lora(load_base(str(tiny_model_dir), dtype="bfloat16"), AdapterSpec(rank=4), seed=3)
    other = add_lora(load_base(str(tiny_model_dir), dtype="bfloat16"), AdapterSpec(rank=4), seed=4)
    a, b, c = adapter_state(one), adapter_state(again), adapter_state(other)
    assert {t.dtype for t in a.values()} == {torch.float32}
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)
    assert {n for n, p in one.named_parameters() if p.requires_grad} == {
        n.replace(".weight", ".default.weight") for n in a
    }


def test_all_linear_leaves_the_output_layer_alone(tiny_model_dir: Path) -> None:
    layers = linear_layers(load_base(str(tiny_model_dir)))
    assert layers == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    names = adapter_state(add_lora(load_base(str(tiny_model_dir)), AdapterSpec(), seed=0))
    assert len(names) == 2 * 2 * len(layers)
    assert not any("lm_head" in name for name in names)


def test_targets_are_checked_against_the_model(tiny_model_dir: Path) -> None:
    chosen = adapter_state(add_lora(load_base(str(tiny_model_dir)), AdapterSpec(targets=("q_proj",)), seed=0))
    assert all("q_proj" in name for name in chosen)
    same = adapter_state(add_lora(load_base(str(tiny_model_dir)), AdapterSpec(targets="q_proj"), seed=0))
    assert same.keys() == chosen.keys()
    with pytest.raises(ConfigError, match=r"adapter.targets=c_attn is not a linear layer .* q_proj"):
        add_lora(load_base(str(tiny_model_dir)), AdapterSpec(targets=("q_proj", "c_attn")), seed=0)
    with pytest.raises(ConfigError, match=r"adapter.targets=lm_head"):
        add_lora(load_base(str(tiny_model_dir)), AdapterSpec(targets="lm_head"), seed=0)
    with pytest.raises(ConfigError, match=r"adapter.targets is empty"):
        add_lora(load_base(str(tiny_model_dir)), AdapterSpec(targets=()), seed=0)


@pytest.mark.parametrize("arch", ["qwen3", "gpt2"])
def test_saved_adapter_merges_into_its_base(tmp_path: Path, tiny_text: Path, arch: str) -> None:
    """gpt2 keeps its weights transposed (Conv1D)."""
    base = tmp_path / "base"
    init_model(base, arch=arch, layers=2, hidden_size=32, heads=4, vocab_size=300, train_tokenizer_files=[tiny_text])
    model = trained(base)
    save_adapter(model, tmp_path / "adapter", base=str(base))
    merged = merge_adapter(str(base), str(tmp_path / "adapter")).eval()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert (logits(merged) - logits(model)).abs().max() < 1e-5
    assert (logits(merged) - logits(load_base(str(base)))).abs().max() > 0.01
    binding = json.loads((tmp_path / "adapter" / BINDING).read_text())
    assert binding == {"base": str(base), "base_sha256": weights_sha256(base)}


def test_state_round_trips_under_both_spellings(tiny_model_dir: Path) -> None:
    model = trained(tiny_model_dir)
    state = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    for names in (state, {n.replace(".weight", ".default.weight"): t for n, t in state.items()}):
        fresh = add_lora(load_base(str(tiny_model_dir)), AdapterSpec(rank=4), seed=9)
        load_adapter_state(fresh, names)
        assert torch.equal(logits(fresh.eval()), logits(model))
    short = dict(list(state.items())[1:])
    with pytest.raises(ConfigError, match="adapter does not fit the saved tensors: 1 differ"):
        load_adapter_state(fresh, short)
    with pytest.raises(ConfigError, match="does not fit"):
        load_adapter_state(add_lora(load_base(str(tiny_model_dir)), AdapterSpec(rank=8), seed=9), state)


def test_merging_into_another_base_is_refused(tmp_path: Path, tiny_model_dir: Path) -> None:
    save_adapter(trained(tiny_model_dir), tmp_path / "adapter", base=str(tiny_model_dir))
    init_model(tmp_path / "other", like=str(tiny_model_dir), seed=5)
    with pytest.raises(ConfigError, match="was trained on other weights than those of"):
        merge_adapter(str(tmp_path / "other"), str(tmp_path / "adapter"))
    (tmp_path / "adapter" / BINDING).unlink()
    with pytest.raises(ConfigError, match="which weights it was trained on is unknown"):
        merge_adapter(str(tiny_model_dir), str(tmp_path / "adapter"))
