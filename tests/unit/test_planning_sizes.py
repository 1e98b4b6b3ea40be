"""What the planner's arithmetic rests on: counted parameters, known devices, published figures."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from rayswift.planning.hardware import find_gpu
from rayswift.planning.layout import Layout
from rayswift.planning.memory import checkpoint_bytes, estimate, trainable_params
from rayswift.planning.model_shape import count_params, shape_from_config, shape_from_folder
from rayswift.planning.throughput import flops_per_token
from tests.job_cases import SHAPE_8B, make_job

GB = 10**9


def test_parameters_of_a_folder_are_counted_exactly(tiny_model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    shape = shape_from_folder(tiny_model_dir)
    assert shape.num_params == sum(p.numel() for p in model.parameters())
    assert (shape.hidden_size, shape.num_layers, shape.num_heads, shape.num_kv_heads) == (32, 2, 4, 2)
    assert shape.vocab_size == 512
    assert shape.architecture == "Qwen3ForCausalLM"


def test_a_folder_without_weights_gets_a_dense_estimate(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_model_dir / "config.json").read_text())
    counted, estimated = shape_from_folder(tiny_model_dir), shape_from_folder(tmp_path)
    assert estimated.num_params == pytest.approx(counted.num_params, rel=0.01)


def test_the_dense_estimate_of_a_published_model() -> None:
    config = {
        "architectures": ["Qwen3ForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "intermediate_size": 12_288,
        "tie_word_embeddings": False,
    }  # fmt: skip
    assert shape_from_config(config).num_params == pytest.approx(8.19e9, rel=0.001)  # the model card of Qwen3-8B


def test_other_names_for_sizes_are_known() -> None:
    shape = shape_from_config({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257})
    assert (shape.hidden_size, shape.num_layers, shape.num_kv_heads, shape.intermediate_size) == (768, 12, 12, 3072)
    nested = shape_from_config({"architectures": ["VL"], "text_config": {"hidden_size": 8, "num_hidden_layers": 3}})
    assert (nested.architecture, nested.hidden_size, nested.num_layers) == ("VL", 8, 3)


def test_experts_are_counted() -> None:
    dense = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
             "intermediate_size": 256, "moe_intermediate_size": 32}  # fmt: skip
    experts = shape_from_config({**dense, "num_experts": 8}).num_params
    assert experts - shape_from_config(dense).num_params == 2 * 3 * 64 * (8 * 32 - 256)


def test_count_params_reads_the_header_alone(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": {"dtype": "F32", "shape": [3, 5]},
                         "scalar": {"dtype": "F32", "shape": []}}).encode()  # fmt: skip
    file = tmp_path / "m.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)  # no tensor data at all
    assert count_params(file) == 16


def test_a_folder_without_config_is_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        shape_from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "memory_bytes", "expected"),
    [
        ("NVIDIA A100-SXM4-40GB", 42 * GB, "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", 85 * GB, "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 21 * GB, "A100-40GB"),
        ("NVIDIA H100 80GB HBM3", 85 * GB, "H100"),
        ("NVIDIA H200", 150 * GB, "H200"),
        ("NVIDIA B200", 190 * GB, "B200"),
        ("NVIDIA L40S", 48 * GB, "L40S"),
        ("NVIDIA A10G", 24 * GB, "A10"),
        ("NVIDIA GeForce RTX 4090", 25 * GB, "RTX 4090"),
        ("NVIDIA RTX A1000", 8 * GB, None),
        ("NVIDIA L40", 48 * GB, None),
        ("Tesla V100", 32 * GB, None),
    ],
)
def test_devices_are_known_by_the_name_torch_gives_them(name: str, memory_bytes: int, expected: str | None) -> None:
    found = find_gpu(name, memory_bytes)
    assert (found.name if found else None) == expected


def test_states_per_parameter_are_those_of_zero() -> None:
    job = make_job()  # float32 weights, gradients and two AdamW moments: 16 bytes a parameter
    alone = estimate(SHAPE_8B, job, Layout())
    assert alone.parameters + alone.gradients + alone.optimizer == 16 * SHAPE_8B.num_params
    sharded = estimate(SHAPE_8B, job, Layout(dp_shard=8))
    assert sharded.parameters + sharded.gradients + sharded.optimizer == 2 * SHAPE_8B.num_params
    replicated = estimate(SHAPE_8B, job, Layout(dp_replicate=8))
    assert replicated.parameters == alone.parameters


def test_an_adapter_needs_a_fraction_of_the_states() -> None:
    full, lora = (
        make_job(**{"model.dtype": "bfloat16"}),
        make_job(**{"model.dtype": "bfloat16", "adapter": {"rank": 16}}),
    )
    assert trainable_params(SHAPE_8B, lora) < 0.01 * SHAPE_8B.num_params
    assert estimate(SHAPE_8B, lora, Layout()).total < 0.3 * estimate(SHAPE_8B, full, Layout()).total
    assert checkpoint_bytes(SHAPE_8B, full) == 12 * SHAPE_8B.num_params


def test_trainable_params_bound_a_real_adapter_from_above(tiny_model_dir: Path) -> None:
    from rayswift.config.job import AdapterSpec
    from rayswift.models.adapters import add_lora, load_base

    model = add_lora(load_base(str(tiny_model_dir)), AdapterSpec(rank=4), seed=0)
    real = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert real <= trainable_params(shape_from_folder(tiny_model_dir), make_job(adapter={"rank": 4})) <= 1.5 * real


def test_flops_follow_the_one_formula() -> None:
    full, lora = make_job(), make_job(adapter={"rank": 16})
    matrices = SHAPE_8B.num_params - SHAPE_8B.vocab_size * SHAPE_8B.hidden_size
    attention = 6 * 36 * 4096 * 32
    assert flops_per_token(SHAPE_8B, full) == 6 * matrices + attention
    assert flops_per_token(SHAPE_8B, lora) == 4 * matrices + 6 * trainable_params(SHAPE_8B, lora) + attention
