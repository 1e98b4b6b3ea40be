"""A LLaVA's tower has the hub's names, whoever wrote the folder, and holds the same numbers under them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from rayswift.models.folder import INDEX, check_weights, weight_files
from rayswift.models.hub_names import has_hub_names, write_hub_names
from tests.export_cases import export
from tests.multimodal_models import make

_BARE, _HUB = "vision_tower.embeddings.class_embedding", "vision_tower.vision_model.embeddings.class_embedding"


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(folder / file).items()}


def _write_bare(folder: Path, **saved: Any) -> Any:
    """The model in a folder as transformers writes one that it has made, and not read."""
    make("llava", folder)
    (folder / "model.safetensors").unlink()
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    model.save_pretrained(folder, **saved)
    assert _BARE in _tensors(folder)
    return model


@pytest.mark.parametrize("saved", [{}, {"max_shard_size": "60KB"}], ids=["one file", "shards"])
def test_a_tower_gets_the_names_of_the_hub_and_keeps_its_numbers(tmp_path: Path, saved: dict[str, Any]) -> None:
    made = _write_bare(tmp_path / "m", **saved)
    before = _tensors(tmp_path / "m")
    assert not has_hub_names(tmp_path / "m")
    assert (tmp_path / "m" / INDEX).exists() == bool(saved)
    for _ in range(2):  # the second time there is nothing to do
        write_hub_names(tmp_path / "m")
        assert has_hub_names(tmp_path / "m")
        check_weights(tmp_path / "m")
        after = _tensors(tmp_path / "m")
        assert _HUB in after
        assert {name.replace(".vision_model.", "."): tensor.tolist() for name, tensor in after.items()} == {
            name: tensor.tolist() for name, tensor in before.items()
        }
    if saved:
        index = json.loads((tmp_path / "m" / INDEX).read_text())["weight_map"]
        assert index.keys() == after.keys()
        assert all(name in load_file(tmp_path / "m" / file) for name, file in index.items())
    read, told = AutoModelForImageTextToText.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert all(torch.equal(value, read.state_dict()[name]) for name, value in made.state_dict().items())


def test_an_export_has_the_names_of_the_hub(tmp_path: Path) -> None:
    _write_bare(tmp_path / "base")
    export(str(tmp_path / "base"), str(tmp_path / "out"))
    assert has_hub_names(tmp_path / "out")
    assert _HUB in _tensors(tmp_path / "out")


def test_other_models_keep_their_names(tmp_path: Path) -> None:
    folder = make("internvl", tmp_path / "m")
    names = _tensors(folder).keys()
    assert any(name.startswith("vision_tower.") for name in names)
    write_hub_names(folder)
    assert _tensors(folder).keys() == names
