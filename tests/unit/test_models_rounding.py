"""A model rounded in memory is the one that is loaded in that type: what is computed and kept stays in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rayswift.export import pipeline
from rayswift.models.adapters import load_base
from rayswift.models.rounding import round_weights
from tests.architecture_cases import tiny_architecture
from tests.export_cases import export

IDS_BT = torch.arange(600)[None] % 500


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gptj", "gemma", "gpt_oss", "deepseek_v3", "ernie4_5_moe", "jamba"])
def test_every_tensor_has_the_type_and_the_numbers_that_loading_gives_it(
    tmp_path: Path, arch: str, dtype: torch.dtype
) -> None:
    tiny_architecture(arch).save_pretrained(tmp_path)
    model = load_base(str(tmp_path), dtype="float32")
    round_weights(model, str(tmp_path), dtype)
    found, expected = tensors(model), tensors(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))
    assert {name: one.dtype for name, one in found.items()} == {name: one.dtype for name, one in expected.items()}
    assert not [name for name, one in found.items() if not torch.equal(one, expected[name])]


def test_what_an_export_calibrates_on_says_the_same_far_along_a_row(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotary frequencies in bfloat16 turn position 500 too far by up to 0.2 radians."""
    found = list[torch.Tensor]()
    write = pipeline.write_model

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            said: torch.Tensor = model.eval()(input_ids=IDS_BT, use_cache=False).logits
        return said

    def watched(model: PreTrainedModel, base: Path, stage: Path) -> None:
        found.append(logits(model))
        write(model, base, stage)

    monkeypatch.setattr(pipeline, "write_model", watched)
    export(str(tiny_model_dir), str(tmp_path / "out"), dtype="bfloat16", verify=False)
    loaded = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    assert torch.equal(found[0], logits(loaded))
