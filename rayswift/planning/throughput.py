"""Arithmetic of a training step, and the time it takes on known hardware.

One MFU formula, PaLM's (arXiv 2204.02311, appendix B), halved in the attention term for causal masks: full fine-tuning
6 P + 6 L a s per token, LoRA 4 P_frozen + 6 P_lora + 6 L a s. P are the parameters a token is multiplied with: of the
experts those that are used, of the embeddings the output head, which a tied input embedding is. a is the width of all
heads together. Recomputation is not counted as useful work.
"""

from __future__ import annotations

from rayswift.config.job import Job
from rayswift.planning.hardware import GpuSpec
from rayswift.planning.layout import Layout
from rayswift.planning.memory import trainable_params
from rayswift.planning.model_shape import ModelShape

_EXPECTED_MFU = 0.4  # what well-tuned dense runs report on A100 and H100


def flops_per_token(shape: ModelShape, job: Job) -> float:
    """Useful floating point operations of forward and backward per trained token."""
    attention = 6 * shape.num_layers * shape.attention_size * job.data.max_length
    if job.adapter is None:
        return 6.0 * shape.matmul_params + attention
    return 4.0 * shape.matmul_params + 6.0 * trainable_params(shape, job) + attention


def expected_tokens_per_second(shape: ModelShape, job: Job, layout: Layout, gpu: GpuSpec | None) -> float | None:
    """Tokens per second of all workers at the MFU good runs reach; None without a figure for device and dtype."""
    tflops = None if gpu is None else gpu.tflops(job.model.dtype)
    if tflops is None:
        return None
    return layout.world_size * tflops * 1e12 * _EXPECTED_MFU / flops_per_token(shape, job)
