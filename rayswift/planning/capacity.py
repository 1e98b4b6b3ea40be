"""What one worker may use of a cluster's memory: of its device, and of the node it is on."""

from __future__ import annotations

from rayswift.planning.hardware import ClusterSpec

_USABLE = 0.92  # of a memory; the rest is fragmentation and communication buffers


def usable(num_bytes: int) -> int:
    """What a plan may fill of so many bytes."""
    return int(_USABLE * num_bytes)


def worker_bytes(cluster: ClusterSpec, workers: int) -> int:
    """Bytes of one worker: of its device, or its share of the memory that CPU workers have together."""
    return cluster.device_memory_bytes or cluster.memory_bytes // workers


def host_bytes(cluster: ClusterSpec, workers: int) -> int | None:
    """A worker's share of the memory of its node, the smallest where nodes differ; None where it is not known."""
    if cluster.device == "cpu" or not cluster.memory_bytes:
        return None
    nodes = [node for node in cluster.nodes if node.num_devices and node.memory_bytes]
    if nodes:
        return min(node.memory_bytes // min(node.num_devices, workers) for node in nodes)
    per_node = -(-cluster.num_devices // cluster.num_nodes)
    return cluster.memory_bytes // cluster.num_nodes // max(1, min(per_node, workers))
