"""Memory of one worker, part by part, in bytes.

Sources: ZeRO, arXiv 1910.02054 (states per parameter); Korthikanti et al., arXiv 2205.05198 (activations:
34 bytes per token, layer and hidden unit in 16 bit, attention scores not kept because sdpa recomputes them).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from rayswift.config.job import Job
from rayswift.planning.layout import Layout
from rayswift.planning.model_shape import ModelShape

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_ACTIVATION_BYTES_16BIT = 34
_RUNTIME_BYTES = 300 * 10**6  # an interpreter with torch and transformers loaded, or a CUDA context


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one worker at the peak of a step."""

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    logits: int
    runtime: int = _RUNTIME_BYTES

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(asdict(self).values())


def trainable_params(shape: ModelShape, job: Job) -> int:
    """Parameters that get gradients. A LoRA pair on an (n, m) matrix has rank * (n + m) of them."""
    if job.adapter is None:
        return shape.num_params
    wanted = job.adapter.targets
    targets = (wanted,) if isinstance(wanted, str) else wanted
    return job.adapter.rank * sum(
        layer.num_in + layer.num_out
        for layer in shape.linear_layers()
        if wanted == "all-linear" or any(map(layer.is_named, targets))
    )


def estimate(shape: ModelShape, job: Job, layout: Layout) -> MemoryEstimate:
    """The memory of one worker for this layout. Monotone: more tokens, layers or rank never need less."""
    shards = layout.dp_shard
    compute = DTYPE_BYTES[job.model.dtype]
    trained = trainable_params(shape, job)
    frozen = 0 if job.adapter is None else shape.num_params
    tokens = job.train.micro_batch_size * job.data.max_length
    states = {"adamw": 8, "sgd": 4 if job.train.momentum else 0}[job.train.optimizer]
    per_layer = 2 if job.model.activation_checkpointing else _ACTIVATION_BYTES_16BIT
    kept = per_layer * shape.num_layers + (
        _ACTIVATION_BYTES_16BIT if job.model.activation_checkpointing else 0
    )  # recomputation brings back one block at a time
    return MemoryEstimate(
        parameters=(4 * trained + compute * frozen) // shards,
        gradients=4 * trained // shards,
        optimizer=states * trained // shards,
        gathered=2 * compute * shape.params_per_block if shards > 1 else 0,
        activations=tokens * shape.hidden_size * kept * compute // 2,
        logits=tokens * shape.vocab_size * (compute + 8),
    )


def checkpoint_bytes(shape: ModelShape, job: Job) -> int:
    """Bytes of one checkpoint on disk: trained weights in float32 and the optimizer's states."""
    states = {"adamw": 8, "sgd": 4 if job.train.momentum else 0}[job.train.optimizer]
    return (4 + states) * trainable_params(shape, job)
