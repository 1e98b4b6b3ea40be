"""Which engine runs a job: what the job asks for is matched with what engines say they can do.

No name of an engine stands here. What is rejected is kept with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from rayswift.config.job import Job
from rayswift.planning.capability import Capability
from rayswift.planning.layout import Layout
from rayswift.planning.model_shape import ModelShape


@dataclass(frozen=True)
class Rejected:
    """An alternative that was looked at, and why it was not taken."""

    what: str
    reason: str


@dataclass(frozen=True)
class Engines:
    """What the engines can do, by name, and the optional packages that are not installed here."""

    capabilities: Mapping[str, Capability]
    absent: frozenset[str] = frozenset()

    def considered(self, job: Job) -> list[str]:
        """The engines a job may run on, the preferred one first."""
        asked = job.parallel.engine
        names = self.capabilities if asked == "auto" else [asked]
        return sorted(names, key=lambda name: (self.capabilities.get(name, _NOTHING).preference, name))

    def lacks_package(self, name: str) -> bool:
        """Whether the package that this engine needs is not installed."""
        return self.capabilities.get(name, _NOTHING).requires in self.absent


_NOTHING = Capability(frozenset())


def wanted_features(job: Job, layout: Layout, needs: frozenset[str] = frozenset()) -> frozenset[str]:
    """What an engine must support: what the job asks for, and what its method needs."""
    p = job.parallel
    asked = {
        job.model.dtype: True,
        job.adapter.name if job.adapter else "full": True,
        "nf4": job.model.quantization == "nf4",
        "offload_optimizer": p.offload == "optimizer",
        "offload_parameters": p.offload == "parameters",
        "offload_nvme": p.nvme is not None,
        "zero_stage": p.zero_stage is not None or p.deepspeed is not None,
        **{axis: size > 1 for axis, size in asdict(layout).items()},
    }
    return needs | {feature for feature, is_asked in asked.items() if is_asked}


def circumstances(job: Job, shape: ModelShape) -> frozenset[str]:
    """What is not asked for and met as it is; it matters where an engine names it in a conflict."""
    met = {
        "tied": shape.tied,
        "moe": shape.num_experts > 1,
        "packing": job.data.packing,
        "recompute": job.model.activation_checkpointing,
    }
    return frozenset(feature for feature, is_met in met.items() if is_met)


def match(
    job: Job, engines: Engines, wanted: frozenset[str], met: frozenset[str]
) -> tuple[str | None, tuple[Rejected, ...]]:
    """The preferred engine that can run the job, None where none can, and why the others do not."""
    chosen: str | None = None
    rejected: list[Rejected] = []
    for name in engines.considered(job):
        reason = _reason(name, engines, wanted, met)
        if reason is None and chosen is None:
            chosen = name
        else:
            rejected.append(Rejected(f"engine {name}", reason or f"could run it too; {chosen} is preferred"))
    return chosen, tuple(rejected)


def _reason(name: str, engines: Engines, wanted: frozenset[str], met: frozenset[str]) -> str | None:
    """Why an engine cannot run this; None when it can."""
    capability = engines.capabilities.get(name)
    if capability is None:
        return f"is not one of {', '.join(sorted(engines.capabilities))}"
    if missing := capability.missing(wanted):
        return f"does not support {', '.join(sorted(missing))}"
    if conflict := capability.broken(wanted | met):
        return f"cannot combine {', '.join(sorted(conflict.features))}: {conflict.reason}"
    if engines.lacks_package(name):
        return f"needs the package {capability.requires}, which is not installed"
    return None


def instead(job: Job, engines: Engines, wanted: frozenset[str], met: frozenset[str]) -> str | None:
    """What an engine says works instead, of those that support all that is wanted, but not together; or what to
    install. None where no engine comes that near."""  # fmt: skip
    for name in engines.considered(job):
        capability = engines.capabilities.get(name, _NOTHING)
        if capability.missing(wanted):
            continue
        conflict = capability.broken(wanted | met)
        return conflict.instead if conflict else f"install it: pip install 'rayswift[{capability.requires}]'"
    return None
