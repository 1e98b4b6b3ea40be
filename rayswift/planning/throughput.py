"""Arithmetic of a training step, and the time it takes on known hardware.

One MFU formula: full fine-tuning 6 (P - P_input_embedding) + 6 L h s per token (causal); LoRA 4 P_frozen +
6 P_lora + 6 L h s. Recomputation is not counted as useful work (PaLM, arXiv 2204.02311, appendix B).
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
    attention = 6 * shape.num_layers * shape.hidden_size * job.data.max_length
    matrices = shape.num_params - shape.vocab_size * shape.hidden_size
    if job.adapter is None:
        return 6.0 * matrices + attention
    return 4.0 * matrices + 6.0 * trainable_params(shape, job) + attention


def expected_tokens_per_second(shape: ModelShape, job: Job, layout: Layout, gpu: GpuSpec | None) -> float | None:
    """Tokens per second of all workers at the MFU good runs reach; None on hardware without figures."""
    if gpu is None:
        return None
    return layout.world_size * gpu.bf16_tflops * 1e12 * _EXPECTED_MFU / flops_per_token(shape, job)
