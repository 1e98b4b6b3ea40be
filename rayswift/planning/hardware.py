"""Hardware as data: what one accelerator holds and does, and what a cluster offers.

Dense figures, not the sparse ones that are often quoted. Source: vendor data sheets; memory bandwidth in TB/s.
Whole machines are in node_shapes.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GB = 10**9


@dataclass(frozen=True)
class GpuSpec:
    """One accelerator model. Rates are dense TFLOPS, FP8's 0 without; NVLink is GB/s per direction, 0 without."""

    name: str
    memory_bytes: int
    bf16_tflops: float
    memory_tb_s: float
    nvlink_gb_s: float = 0
    fp8_tflops: float = 0

    def tflops(self, dtype: str) -> float | None:
        """The dense rate in a dtype: both 16-bit types run at the same. None for float32, which has no figure here."""
        return {"float32": None, "float8": self.fp8_tflops or None}.get(dtype, self.bf16_tflops)


GPUS = (
    GpuSpec("A100-40GB", 40 * GB, 312, 1.56, 300),
    GpuSpec("A100-80GB", 80 * GB, 312, 2.0, 300),
    GpuSpec("H100", 80 * GB, 989, 3.35, 450, 1979),
    GpuSpec("H200", 141 * GB, 989, 4.8, 450, 1979),
    GpuSpec("B200", 180 * GB, 2250, 8.0, 900, 4500),
    GpuSpec("L40S", 48 * GB, 362, 0.86, fp8_tflops=733),
    GpuSpec("A10", 24 * GB, 125, 0.60),
    GpuSpec("RTX 4090", 24 * GB, 165, 1.01, fp8_tflops=330),
)


@dataclass(frozen=True)
class NodeSpec:
    """One node of a cluster: its whole resources, not what is free. `num_devices` counts the job's kind of device.

    `shape` and `accelerator_type` are the node's labels `rayswift.io/node-shape` and `ray.io/accelerator-type`, empty
    where it has none.
    """

    id: str
    num_devices: int
    num_cpus: float
    memory_bytes: int = 0
    shape: str = ""
    accelerator_type: str = ""


@dataclass(frozen=True)
class ClusterSpec:
    """What the planner may use. On a CPU `num_devices` is 0 and workers share `memory_bytes`.

    `gpu` and `device_memory_bytes` are those of the weakest device. `nodes` is empty where they are not known; then
    nothing can be said of what fits one node.
    """

    device: str
    num_devices: int
    num_cpus: float
    memory_bytes: int
    device_memory_bytes: int | None = None
    gpu: GpuSpec | None = None
    num_nodes: int = 1
    nodes: tuple[NodeSpec, ...] = ()


def find_gpu(device_name: str, memory_bytes: int = 0) -> GpuSpec | None:
    """The spec of a device as torch or Ray names it ("NVIDIA A100-SXM4-80GB", "A100"); None if unknown.

    Those of one name are told apart by memory; without it the smallest is taken.
    """
    device_name = device_name.replace("-", " ")  # Ray's labels have no spaces: GeForce-RTX-4090
    families = ((gpu, gpu.name.split("-")[0]) for gpu in GPUS)
    candidates = [gpu for gpu, family in families if re.search(rf"{family}(?!\d)", device_name)]  # an A100 is no A10
    return min(candidates, key=lambda g: abs(g.memory_bytes - memory_bytes), default=None)
