"""What the planner's arithmetic rests on: counted parameters, known devices, published figures."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from rayswift.planning.hardware import find_gpu
from rayswift.planning.layout import Layout
from rayswift.planning.memory import checkpoint_bytes, estimate, trainable_params
from rayswift.planning.model_shape import read_header, shape_from_config, shape_from_folder
from rayswift.planning.throughput import expected_tokens_per_second, flops_per_token
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


def test_shapes_are_read_from_the_header_alone(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": {"dtype": "F32", "shape": [3, 5]},
                         "scalar": {"dtype": "F32", "shape": []}}).encode()  # fmt: skip
    file = tmp_path / "m.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)  # no tensor data at all
    assert read_header(file) == {"w": (3, 5), "scalar": ()}


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


ARCHITECTURES = [
    {"arch": "qwen3", "heads": 4, "kv_heads": 2, "extra": {"head_dim": 24}},  # the heads are wider than the hidden size
    {"arch": "gpt2", "heads": 4},  # stores its matrices transposed, query, key and value in one
    {"arch": "qwen3_moe", "heads": 4, "kv_heads": 2, "extra": {"num_experts": 4, "num_experts_per_tok": 2}},
]


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda made: made["arch"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_text: Path) -> str:
    from rayswift.models.init import init_model

    folder = str(tmp_path_factory.mktemp("base") / "base")
    init_model(folder, layers=2, hidden_size=32, vocab_size=512, train_tokenizer_files=[tiny_text], **request.param)
    return folder


def really_trained(base: str, **adapter: Any) -> int:
    from rayswift.config.job import AdapterSpec
    from rayswift.models.adapters import add_lora, load_base

    model = add_lora(load_base(base), AdapterSpec(**adapter), seed=0)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_trainable_params_are_those_of_the_real_adapter(base: str) -> None:
    planned = trainable_params(shape_from_folder(base), make_job(adapter={"rank": 4}))
    assert planned == really_trained(base, rank=4)


def test_an_adapter_on_some_layers_trains_only_those(tiny_model_dir: Path) -> None:
    shape = shape_from_folder(tiny_model_dir)
    for targets in (["q_proj"], ["self_attn.q_proj", "down_proj"], ["model.layers.1.mlp.up_proj"], "o_proj"):
        planned = trainable_params(shape, make_job(adapter={"rank": 4, "targets": targets}))
        assert planned == really_trained(str(tiny_model_dir), rank=4, targets=targets)
        assert planned < trainable_params(shape, make_job(adapter={"rank": 4}))


QWEN3_06B = {
    "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "intermediate_size": 3072,
}  # fmt: skip
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151_936, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "tie_word_embeddings": False,
}  # fmt: skip


def test_an_adapter_on_a_published_shape() -> None:
    shape = shape_from_config(QWEN3_06B)
    assert trainable_params(shape, make_job(adapter={"rank": 8})) == 5_046_272  # counted on the real model by peft
    assert trainable_params(shape, make_job(adapter={"rank": 8, "targets": ["q_proj"]})) == 28 * 8 * (1024 + 2048)


def test_a_head_costs_the_same_whether_or_not_its_matrix_is_the_embedding_too() -> None:
    tied, untied = (shape_from_config({**QWEN3_06B, "tie_word_embeddings": tie}) for tie in (True, False))
    assert untied.num_params - tied.num_params == 151_936 * 1024
    for job in (make_job(), make_job(adapter={"rank": 8})):
        assert flops_per_token(tied, job) == flops_per_token(untied, job)


def test_a_token_passes_through_the_experts_it_is_routed_to(tmp_path: Path) -> None:
    shape = shape_from_config(QWEN3_30B_A3B)
    assert shape.num_params == pytest.approx(30.5e9, rel=0.01)  # the model card: 30.5B in total and 3.3B activated
    assert shape.active_params == pytest.approx(3.3e9, rel=0.02)
    assert flops_per_token(shape, make_job()) < 6 * 3.4e9


def test_experts_count_the_same_in_a_folder_and_in_its_config(base: str) -> None:
    config = json.loads((Path(base) / "config.json").read_text())
    counted, estimated = shape_from_folder(base), shape_from_config(config)
    if config["model_type"] != "gpt2":  # its feed-forward part is not gated, which the estimate takes it to be
        assert counted.active_params == pytest.approx(estimated.active_params, rel=0.02)
    assert (counted.active_params == counted.num_params) == (config["model_type"] != "qwen3_moe")


def write_weights(file: Path, shapes: dict[str, list[int]]) -> None:
    header = json.dumps({name: {"dtype": "F32", "shape": shape} for name, shape in shapes.items()}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header)


def test_only_the_files_that_are_loaded_count(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_06B))
    write_weights(tmp_path / "model.safetensors", {"model.norm.weight": [1000]})
    write_weights(tmp_path / "consolidated.safetensors", {"norm.weight": [1000]})  # Mistral's own names for the same
    assert shape_from_folder(tmp_path).num_params == 1000
    for part in ("a", "b"):
        write_weights(tmp_path / f"model-{part}.safetensors", {f"model.{part}.weight": [30]})
    weight_map = {"model.a.weight": "model-a.safetensors", "model.b.weight": "model-b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert shape_from_folder(tmp_path).num_params == 60


def test_whether_embeddings_are_tied_is_seen_in_the_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_06B))
    embedding, head = {"model.embed_tokens.weight": [10, 4]}, {"lm_head.weight": [10, 4]}
    write_weights(tmp_path / "model.safetensors", embedding)
    assert shape_from_folder(tmp_path).tied
    write_weights(tmp_path / "model.safetensors", embedding | head)
    assert not shape_from_folder(tmp_path).tied
    (tmp_path / "config.json").write_text(json.dumps({**QWEN3_06B, "tie_word_embeddings": True}))
    assert shape_from_folder(tmp_path).num_params == 40  # stored twice, one parameter


def test_flops_of_an_8b_model() -> None:
    # Kaplan et al. (arXiv 2001.08361): 6 per non-embedding parameter; the model card of Qwen3-8B says 6.95e9 of them.
    head, attention = 6 * 151_936 * 4096, 6 * 36 * 4096 * 32
    assert flops_per_token(SHAPE_8B, make_job()) == pytest.approx(6 * 6.95e9 + head + attention, rel=0.001)
    lora = flops_per_token(SHAPE_8B, make_job(adapter={"rank": 16}))
    assert 2 / 3 < lora / flops_per_token(SHAPE_8B, make_job()) < 0.68  # no gradients of frozen weights


@pytest.mark.parametrize(("dtype", "known"), [("bfloat16", True), ("float16", True), ("float32", False)])
def test_a_rate_is_that_of_the_dtype_or_unknown(dtype: str, known: bool) -> None:
    job = make_job(**{"model.dtype": dtype})
    rate = expected_tokens_per_second(SHAPE_8B, job, Layout(), find_gpu("NVIDIA H100 80GB HBM3", 85 * GB))
    assert (rate is not None) == known
    assert rate is None or rate == pytest.approx(0.4 * 989e12 / flops_per_token(SHAPE_8B, job))
    assert expected_tokens_per_second(SHAPE_8B, job, Layout(), None) is None
