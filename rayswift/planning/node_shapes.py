"""Node shapes as data: how many GPUs of which kind a machine holds, and how fast they reach each other and the others.

A node says its shape in the label `rayswift.io/node-shape`, as cluster.yaml and clusters/ set it. The name reads
`<gpu>-<count>x<GB>`, with a suffix where the same GPUs come with another network.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rayswift.planning.hardware import GB, GpuSpec, NodeSpec, find_gpu

SHAPE_LABEL = "rayswift.io/node-shape"
ACCELERATOR_LABEL = "ray.io/accelerator-type"


@dataclass(frozen=True)
class NodeShape:
    """One kind of machine. `network_gb_s` is GB/s per node and direction, None where it is not known.

    `nvlink_domain` is how many GPUs reach each other over NVLink at `gpu.nvlink_gb_s`; 1 where they share PCIe.
    """

    name: str
    gpu: GpuSpec
    num_gpus: int
    nvlink_domain: int
    network_gb_s: float | None = None

    @property
    def max_group(self) -> int:
        """The most GPUs of one tensor parallel group: an NVLink domain, or the node where there is only PCIe."""
        return self.nvlink_domain if self.nvlink_domain > 1 else self.num_gpus


def _named(name: str, network_gb_s: float | None = None) -> NodeShape | None:
    """The shape that a name spells out, NVLink between all GPUs that have it; None for a name that is no shape."""
    match = re.fullmatch(r"([a-z]+[0-9]+[a-z]*)-([1-9][0-9]*)x([1-9][0-9]*)(-[a-z0-9-]+)?", name)
    gpu = find_gpu(match[1].upper(), int(match[3]) * GB) if match else None
    if match is None or gpu is None:
        return None
    num_gpus = int(match[2])
    return NodeShape(name, gpu, num_gpus, num_gpus if gpu.nvlink_gb_s else 1, network_gb_s)


_NETWORK_GB_S = {
    "a100-8x40": 50,  # AWS p4d
    "a100-8x80": 50,  # AWS p4de
    "a100-8x80-a2-ultra": 12.5,  # Google a2-ultragpu
    "h100-8x80": 400,  # AWS p5, DGX H100
    "h100-8x80-a3-high": 100,  # Google a3-highgpu
    "h100-8x80-a3-mega": 200,  # Google a3-megagpu
    "h200-8x141": 400,  # AWS p5e, p5en
    "b200-8x180": 400,  # AWS p6-b200, DGX B200
    "h100-1x80": 12.5,  # AWS p5.4xlarge
    "l40s-8x48": 50,  # AWS g6e.48xlarge
    "a10-8x24": 12.5,  # AWS g5.48xlarge
}
NODE_SHAPES = {name: shape for name, speed in _NETWORK_GB_S.items() if (shape := _named(name, speed)) is not None}


def find_shape(name: str) -> NodeShape | None:
    """The shape of this name; one that is not listed is read from its name, without a network. None for no shape."""
    return NODE_SHAPES.get(name) or _named(name)


def gpu_of(node: NodeSpec) -> GpuSpec | None:
    """What a node's labels say its GPUs are; None when they say nothing. A type alone means the smallest memory."""
    shape = find_shape(node.shape)
    if shape is not None:
        return shape.gpu
    return find_gpu(node.accelerator_type) if node.accelerator_type else None
