"""Arithmetic of a training step, and the time it takes on known hardware.

One MFU formula, PaLM's (arXiv 2204.02311, appendix B), halved in the attention term for causal masks: full fine-tuning
6 P + 6 L a s per token, LoRA 4 P_frozen + 6 P_lora + 6 L a s. P are the parameters a token is multiplied with: of the
experts those that are used, of the embeddings the output head, which a tied input embedding is. a is the width of all
heads together. Recomputation is not counted as useful work; the wait of a pipeline is.
"""

from __future__ import annotations

from rayswift.config.job import Job
from rayswift.planning.hardware import ClusterSpec, GpuSpec
from rayswift.planning.layout import Layout
from rayswift.planning.memory import trainable_params
from rayswift.planning.model_shape import ModelShape
from rayswift.planning.node_shapes import find_shape
from rayswift.planning.slices import pipeline_bubble

_EXPECTED_MFU = 0.4  # what well-tuned dense runs report on A100 and H100
_BUSY = 0.5  # of the peak rate, while matrices are multiplied


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
    working = 1 - pipeline_bubble(layout, job.parallel.schedule, job.num_micro_batches(layout.data_size))
    return layout.world_size * tflops * 1e12 * _EXPECTED_MFU * working / flops_per_token(shape, job)


def hiding_tokens(layout: Layout, dtype: str, cluster: ClusterSpec) -> float | None:
    """Tokens per worker and micro-batch from which computing hides what FSDP gathers; None where nothing is known.

    A gather of 2 bytes per parameter takes 2 P / bandwidth, the forward pass 2 P tokens / rate: they meet at rate /
    bandwidth. Within a node that is NVLink's, between nodes a worker's share of its node's network.
    """
    tflops = None if cluster.gpu is None else cluster.gpu.tflops(dtype)
    bandwidth = _bandwidth_gb_s(layout, cluster)
    if layout.dp_shard * layout.cp == 1 or tflops is None or not bandwidth:
        return None
    return _BUSY * tflops * 1e12 / (bandwidth * 1e9)


def _bandwidth_gb_s(layout: Layout, cluster: ClusterSpec) -> float | None:
    """GB/s of one worker towards those it shares parameters with; None where the nodes do not say what they are."""
    nodes = [node for node in cluster.nodes if node.num_devices]
    group = layout.dp_shard * layout.cp * layout.tp
    if cluster.gpu is not None and group <= min((node.num_devices for node in nodes), default=0):
        return cluster.gpu.nvlink_gb_s
    shapes = [find_shape(node.shape) for node in nodes]
    return min((s.network_gb_s / s.num_gpus if s and s.network_gb_s else 0.0 for s in shapes), default=None)
