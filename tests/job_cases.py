"""Jobs and clusters that the core suites share: small, valid, and changed by dotted keys."""

from __future__ import annotations

from typing import Any

from rayswift.config.job import Job
from rayswift.planning.capability import Capability, Conflict
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
SHAPE_30B_A3B = ModelShape(
    architecture="Qwen3MoeForCausalLM", hidden_size=2048, num_layers=48, num_heads=32, num_kv_heads=4,
    vocab_size=151_936, intermediate_size=6144, num_params=30_532_122_624, head_dim=128, num_experts=128,
    active_params=3_350_000_000, expert_params=28_991_029_248, expert_size=768,
)  # fmt: skip
ENGINES = {"fsdp2": Capability(frozenset({"dp_replicate", "dp_shard", "float32", "bfloat16", "full", "lora"}))}
# Three engines as they might be: a common one, one that cuts pipelines, and one with a package of its own.
_DENSE = frozenset({"dp_shard", "float32", "bfloat16", "float16", "full", "lora"})
SEVERAL_ENGINES = {
    "zero": Capability(
        _DENSE | {"zero_stage", "offload_optimizer", "offload_parameters", "offload_nvme"}, preference=20,
        requires="deepspeed",
    ),
    "pipeline": Capability(
        _DENSE | {"dp_replicate", "tp", "pp", "ep", "cp"}, preference=10,
        conflicts=(
            Conflict(frozenset({"pp", "tied"}), "one table would be on two stages", "use parallel.tp, not parallel.pp"),
        ),
    ),
    "sharded": Capability(
        _DENSE | {"dp_replicate", "tp", "cp", "ep", "float8", "nf4", "offload_parameters"},
        conflicts=(
            Conflict(frozenset({"nf4", "tp"}), "packed weights have no rows", "use parallel.dp_shard, not parallel.tp"),
        ),
    ),
}  # fmt: skip


def gpu_cluster(
    num_devices: int, memory_bytes: int = 80 * 10**9, num_cpus: float = 96, gpu: str = "NVIDIA A100-SXM4-80GB"
) -> ClusterSpec:
    """Nodes full of A100s, or of another GPU."""
    return ClusterSpec(
        device="cuda", num_devices=num_devices, num_cpus=num_cpus, memory_bytes=512 * GIB,
        device_memory_bytes=memory_bytes, gpu=find_gpu(gpu, memory_bytes),
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
