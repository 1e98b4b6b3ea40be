"""A base whose weights are published packed (MXFP4, FP8 in blocks) comes out as the plain model they stand for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

from rayswift.config.job import AdapterSpec
from rayswift.errors import ConfigError
from rayswift.export.verify import load_in_float32
from rayswift.models.adapters import adapter_state, add_lora, load_base
from rayswift.models.init import init_model
from rayswift.models.loading import check_folder
from tests.export_cases import export, shake, write_run

IDS_BT = torch.arange(5, 25)[None]
_BLOCK = 32


def logprobs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model.eval()(input_ids=IDS_BT, use_cache=False).logits.float(), -1)


def say(base: Path, **said: Any) -> None:
    """Add to what config.json says."""
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | said))


@pytest.fixture
def plain(tmp_path: Path, tiny_text: Path) -> Path:
    init_model(tmp_path / "plain", arch="llama", layers=2, hidden_size=64, heads=4, vocab_size=300,
               tie_embeddings=False, train_tokenizer_files=[tiny_text])  # fmt: skip
    return tmp_path / "plain"


def fp8(plain: Path, base: Path) -> Path:
    """`plain` in FP8, a scale for each block, as DeepSeek and Qwen publish it."""
    shutil.copytree(plain, base)
    packed = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if "_proj" not in name:
            packed[name] = weight.bfloat16()
            continue
        rows, columns = (size // _BLOCK for size in weight.shape)
        blocks = weight.float().reshape(rows, _BLOCK, columns, _BLOCK)
        scales = blocks.abs().amax((1, 3)) / 448
        packed[name] = (blocks / scales[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
        packed[f"{name}_scale_inv"] = scales
    save_file(packed, base / "model.safetensors", metadata={"format": "pt"})
    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [_BLOCK] * 2}
    say(base, quantization_config=said, dtype="bfloat16")
    return base


def mxfp4(plain: Path, base: Path) -> Path:
    """A small gpt-oss as OpenAI publishes it, with the tokenizer of `plain`."""
    shutil.copytree(plain, base)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = GptOssConfig(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=2, pad_token_id=0, rope_parameters=rope,
    )  # fmt: skip
    torch.manual_seed(0)
    GptOssForCausalLM(config).bfloat16().save_pretrained(base)
    packed = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed[name] = weight
            continue
        experts, width, out = weight.shape
        packed[f"{name}_blocks"] = torch.randint(0, 256, (experts, out, width // 32, 16), dtype=torch.uint8)
        packed[f"{name}_scales"] = torch.full((experts, out, width // 32), 120, dtype=torch.uint8)
    save_file(packed, base / "model.safetensors", metadata={"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    say(base, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": kept})
    return base


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("pack", [fp8, mxfp4])
def test_the_plain_model_is_written(tmp_path: Path, plain: Path, pack: Any, verify: bool) -> None:
    base, out = pack(plain, tmp_path / "base"), tmp_path / "out"
    before = logprobs(load_in_float32(str(base)))
    manifest = export(str(base), str(out), verify=verify)
    assert manifest.dtype == "bfloat16"
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    stored = {name: str(weight.dtype) for name, weight in load_file(out / "model.safetensors").items()}
    assert set(stored.values()) == {"torch.bfloat16"}, stored
    assert not [name for name in stored if name.endswith(("_scales", "_blocks", "_scale_inv"))]
    after = logprobs(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))
    assert float((after - before).abs().max()) < 2e-2  # FP8 times its scale is rounded to bfloat16


@pytest.mark.parametrize("pack", [fp8, mxfp4])
def test_beside_a_gpu_that_has_kernels_for_it_it_is_unpacked_too(
    tmp_path: Path, plain: Path, pack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of an export is computed in float32 on the CPU."""
    base = pack(plain, tmp_path / "base")
    before = logprobs(load_in_float32(str(base)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    model = load_in_float32(str(base))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert torch.equal(logprobs(model), before)


def test_a_run_on_it_is_merged(tmp_path: Path, plain: Path) -> None:
    base, spec = fp8(plain, tmp_path / "base"), AdapterSpec(rank=4)
    trained = add_lora(load_base(str(base), dtype="float32"), spec, 0)
    weights = {name: tensor.clone() for name, tensor in adapter_state(trained).items()}
    before = logprobs(trained)
    shake(weights, 0.05)
    write_run(tmp_path / "run", base, weights, spec)
    manifest = export(str(tmp_path / "run"), str(tmp_path / "out"), dtype="float32")
    assert manifest.merge is not None
    assert manifest.verify is not None
    after = logprobs(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    assert float((after - before).abs().max()) > 1e-3


@pytest.mark.parametrize("said", [{"quant_method": "bitsandbytes"}, {"load_in_4bit": True}])
def test_a_folder_that_bitsandbytes_packed_is_refused_but_for_reading(
    tmp_path: Path, plain: Path, said: dict[str, Any]
) -> None:
    say(plain, quantization_config=said)
    with pytest.raises(ConfigError, match=r"packed by bitsandbytes.*unquantized base with model\.quantization: nf4"):
        export(str(plain), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    check_folder(str(plain), read_only=True)
