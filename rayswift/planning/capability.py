"""What an engine can do, as data that the planner matches with what a job wants.

Features are words. What a job asks for must be supported: the mesh axes larger than one (`tp`, ...), dtypes
(`bfloat16`), what is trained (`full`, `lora`), how the base is stored (`nf4`), where state lies (`offload_optimizer`,
`offload_parameters`, `offload_nvme`), settings only some engines know (`zero_stage`), and the needs of methods.
Circumstances are met as they are, and matter only where a conflict names them: `tied` embeddings, `moe`, `packing`,
`recompute`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Conflict:
    """Features that one engine supports, but not together: why, and what works instead."""

    features: frozenset[str]
    reason: str
    instead: str


CUTTING = (
    Conflict(
        frozenset({"nf4", "tp"}),
        "packed 4-bit weights have no rows and columns that tensor parallelism could cut",
        "use parallel.dp_shard instead of parallel.tp",
    ),
    Conflict(
        frozenset({"nf4", "ep"}),
        "bitsandbytes leaves stacked experts in full precision",
        "use parallel.dp_shard alone",
    ),
    Conflict(
        frozenset({"ep", "cp"}),
        "experts would be spread over ranks whose tokens are parts of sequences",
        "use parallel.tp instead of parallel.cp",
    ),
)
"""What no engine that cuts a model over a mesh can do together."""


@dataclass(frozen=True)
class Capability:
    """What an engine supports. Of several that fit, `auto` takes the one with the lowest `preference`.

    `requires` is the optional package it cannot run without; the extra of RaySwift that installs it has its name.
    """

    supports: frozenset[str]
    conflicts: tuple[Conflict, ...] = ()
    preference: int = 0
    requires: str | None = None

    def missing(self, wanted: frozenset[str]) -> frozenset[str]:
        """The wanted features that are not supported at all."""
        return wanted - self.supports

    def broken(self, wanted: frozenset[str]) -> Conflict | None:
        """The first conflict among wanted features and circumstances, if there is one."""
        return next((conflict for conflict in self.conflicts if conflict.features <= wanted), None)
