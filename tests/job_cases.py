"""Jobs and clusters that the core suites share: small, valid, and changed by dotted keys."""

from __future__ import annotations

from typing import Any

from rayswift.config.job import Job
from rayswift.planning.capability import Capability
from rayswift.planning.hardware import ClusterSpec, find_gpu
from rayswift.planning.model_shape import ModelShape

GIB = 2**30
CPU_BOX = ClusterSpec(device="cpu", num_devices=0, num_cpus=8, memory_bytes=16 * GIB)
SMALL_SHAPE = ModelShape(
    architecture="Qwen3ForCausalLM", hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=512,
    intermediate_size=128, num_params=120_000,
)  # fmt: skip
SHAPE_8B = ModelShape(
    architecture="Qwen3ForCausalLM", hidden_size=4096, num_layers=36, num_heads=32, num_kv_heads=8,
    vocab_size=151_936, intermediate_size=12_288, num_params=8_190_735_360,
)  # fmt: skip
ENGINES = {"fsdp2": Capability(frozenset({"dp_replicate", "dp_shard", "float32", "bfloat16", "full", "lora"}))}


def gpu_cluster(num_devices: int, memory_bytes: int = 80 * 10**9, num_cpus: float = 96) -> ClusterSpec:
    """Nodes full of A100s."""
    return ClusterSpec(
        device="cuda", num_devices=num_devices, num_cpus=num_cpus, memory_bytes=512 * GIB,
        device_memory_bytes=memory_bytes, gpu=find_gpu("NVIDIA A100-SXM4-80GB", memory_bytes),
    )  # fmt: skip


def make_job(**changes: Any) -> Job:
    """A valid job with dotted keys changed: `make_job(**{"train.lr": 0.1})`."""
    plain: dict[str, Any] = {
        "name": "demo", "output": "runs", "method": {"name": "sft"}, "model": {"path": "models/base"},
        "data": {"train": [{"path": "rows.jsonl"}], "max_length": 32}, "train": {"global_batch_size": 8},
        "parallel": {}, "cluster": {}, "logging": {"tensorboard": False},
    }  # fmt: skip
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = plain
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    if plain["train"]["global_batch_size"] < 4:
        plain["train"].setdefault("micro_batch_size", plain["train"]["global_batch_size"])
    return Job.model_validate(plain)
