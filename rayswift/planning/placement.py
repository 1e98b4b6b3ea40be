"""Placement: the bundles that training workers are given, and what is left for Ray Data."""

from __future__ import annotations

from dataclasses import dataclass

from rayswift.errors import PlanError
from rayswift.planning.hardware import ClusterSpec

_DATA_SHARE = 0.5  # of a CPU-only machine's cores, kept free for reading and tokenizing


@dataclass(frozen=True)
class Placement:
    """`num_workers` bundles of `resources_per_worker`, placed by `strategy`; `data_cpus` stay free for Ray Data."""

    num_workers: int
    resources_per_worker: dict[str, float]
    strategy: str
    data_cpus: float


def place(num_workers: int, cluster: ClusterSpec) -> Placement:
    """Bundles for the workers. Raises PlanError when the cluster has too few devices or cores."""
    if cluster.device == "cpu":
        return _place_on_cpus(num_workers, cluster)
    if num_workers > cluster.num_devices:
        raise PlanError(
            f"is more than the {cluster.num_devices} {cluster.device} devices of the cluster",
            path="cluster.workers",
            value=num_workers,
            fix=f"use at most {cluster.num_devices}, or add nodes",
        )
    cpus = min(2.0, _DATA_SHARE * cluster.num_cpus / num_workers)
    accelerator = "GPU" if cluster.device in ("cuda", "xpu") else cluster.device.upper()
    resources = {"CPU": cpus} if cluster.device == "mps" else {"CPU": cpus, accelerator: 1.0}
    return Placement(num_workers, resources, "PACK", cluster.num_cpus - cpus * num_workers)


def _place_on_cpus(num_workers: int, cluster: ClusterSpec) -> Placement:
    """CPU workers share half of the cores: fewer starve the step, more starve Ray Data and the run stands still."""
    most = max(1, int(4 * cluster.num_cpus))
    if num_workers > most:
        raise PlanError(
            f"is too many for {cluster.num_cpus:g} CPUs",
            path="cluster.workers",
            value=num_workers,
            fix=f"use at most {most}",
        )
    cpus = round(min(1.0, _DATA_SHARE * cluster.num_cpus / num_workers), 3)
    return Placement(num_workers, {"CPU": cpus}, "PACK", cluster.num_cpus - cpus * num_workers)
