"""The layouts and the cases that are held against one process, as data: `make parity` runs every row, `make test` some.

A new layout is a line in LAYOUTS, a new way to train a line in CASES; each layout meets each case.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rayswift import plugins
from rayswift.config.job import Job
from rayswift.planning.layout import Layout, Seat
from tests.engine_cases import tiny_model
from tests.job_cases import make_job
from tests.parity import LR, Outcome, Step, run_engine, run_reference

STEPS = 4
# Parameters below DeepSpeed's threshold stay whole on every rank, which in a tiny model would be all of them.
_ZERO = {
    "stage": "auto", "stage3_param_persistence_threshold": 40, "offload_optimizer": {"device": "auto"},
    "offload_param": {"device": "auto"},
}  # fmt: skip


@dataclass(frozen=True)
class Arrangement:
    """Who computes what: a layout on an engine, around a model that it can cut."""

    layout: Layout
    engine: str = "fsdp2"
    arch: str = "qwen3"
    layers: int = 2
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """What is trained, and in how many pieces a step is computed."""

    method: str = "sft"
    adapter: str = "full"
    packing: bool = True
    micro_batches: int = 1
    tied: bool = False
    recompute: bool = False
    max_norm: float | None = 0.5

    @property
    def details(self) -> str:
        """What is particular about it, in a few words."""
        words = {
            "packed" if self.packing else "unpacked": True,
            f"{self.micro_batches} micro-batches": self.micro_batches > 1,
            "tied": self.tied,
            "recomputed": self.recompute,
            "not clipped": self.max_norm is None,
        }
        return ", ".join(word for word, holds in words.items() if holds)

    def job(self, **settings: Any) -> Job:
        """The job of this case, under SGD."""
        return make_job(**{
            "method.name": self.method, "train.optimizer": "sgd", "train.lr": LR, "train.max_grad_norm": self.max_norm,
            "model.activation_checkpointing": self.recompute, **ADAPTERS[self.adapter], **settings,
        })  # fmt: skip


# The settings of a job that make an adapter. `qlora` goes here: {"adapter": {"rank": 4}, "model.quantization": "nf4"}.
ADAPTERS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"adapter": {"rank": 4}}}


def _pipeline(schedule: str = "1f1b", **sizes: int) -> Arrangement:
    """Five blocks do not divide by any number of stages."""
    return Arrangement(Layout(pp=2, **sizes), "pipeline", layers=5, settings={"parallel.schedule": schedule})


def _experts(**sizes: int) -> Arrangement:
    return Arrangement(Layout(ep=2, **sizes), arch="qwen3_moe")


def _zero(stage: int, **settings: Any) -> Arrangement:
    return Arrangement(Layout(dp_shard=2), "deepspeed", settings={"parallel.zero_stage": stage, **settings})


LAYOUTS: dict[str, Arrangement] = {
    "one process": Arrangement(Layout()),
    "ddp 2": Arrangement(Layout(dp_replicate=2)),
    "fsdp2 2": Arrangement(Layout(dp_shard=2)),
    "fsdp2 4": Arrangement(Layout(dp_shard=4)),
    "hsdp 2x2": Arrangement(Layout(dp_replicate=2, dp_shard=2)),
    "fsdp2 2, parameters offloaded": Arrangement(Layout(dp_shard=2), settings={"parallel.offload": "parameters"}),
    "tp 2": Arrangement(Layout(tp=2)),
    "tp 2, qwen3_moe": Arrangement(Layout(tp=2), arch="qwen3_moe"),
    "tp 2 x fsdp2 2": Arrangement(Layout(dp_shard=2, tp=2)),
    "cp 2": Arrangement(Layout(cp=2)),
    "cp 2 x fsdp2 2": Arrangement(Layout(dp_shard=2, cp=2)),
    "cp 2 x tp 2": Arrangement(Layout(cp=2, tp=2)),
    "ep 2": _experts(dp_shard=2),
    "ep 2 x fsdp2 2": _experts(dp_shard=4),
    "ep 2 x tp 2": _experts(dp_shard=2, tp=2),
    "pp 2, 1f1b": _pipeline(),
    "pp 2, interleaved_1f1b": _pipeline("interleaved_1f1b"),
    "pp 2, zero_bubble": _pipeline("zero_bubble"),
    "pp 2, zbv": _pipeline("zbv"),
    "pp 2 x fsdp2 2": _pipeline(dp_shard=2),
    "pp 2 x cp 2": _pipeline(cp=2),
    "pp 2 x ep 2": Arrangement(Layout(pp=2, dp_shard=2, ep=2), "pipeline", arch="qwen3_moe"),
    "pp 2 x tp 2 x fsdp2 2": _pipeline(tp=2, dp_shard=2),
    "zero 1": _zero(1),
    "zero 2": _zero(2),
    "zero 3": _zero(3),
    "zero 2, optimizer on the host": _zero(2, **{"parallel.offload": "optimizer"}),
    "zero 3, parameters on the host": _zero(3, **{"parallel.offload": "parameters"}),
    "zero 3, optimizer on nvme": _zero(3, **{"parallel.offload": "optimizer", "parallel.nvme": "nvme"}),
}

CASES: dict[str, Case] = {
    "packed": Case(),
    "recomputed": Case(micro_batches=2, recompute=True),
    "accumulated": Case(packing=False, micro_batches=3),
    "tied": Case(micro_batches=2, tied=True, max_norm=None),
    "text": Case("pretrain", packing=False),
    "text, tied": Case("pretrain", micro_batches=2, tied=True),
    "lora": Case(adapter="lora", micro_batches=2),
    "lora, recomputed": Case(adapter="lora", packing=False, micro_batches=2, recompute=True),
    "text, lora": Case("pretrain", "lora", packing=False, tied=True),
    "text, lora, recomputed": Case("pretrain", "lora", micro_batches=2, recompute=True, tied=True),
}

# What `make test` runs, each layout at least once. DeepSpeed has a suite of its own: tests/ranks/test_deepspeed.py.
SLICE: dict[str, tuple[str, ...]] = {
    "one process": tuple(CASES),
    "ddp 2": ("accumulated", "text, lora"),
    "fsdp2 2": tuple(CASES),
    "fsdp2 4": ("accumulated", "lora, recomputed"),
    "hsdp 2x2": ("recomputed", "text, lora"),
    "fsdp2 2, parameters offloaded": ("text, tied", "lora"),
    "tp 2": ("recomputed", "accumulated", "tied", "lora", "text, lora, recomputed"),
    "tp 2, qwen3_moe": ("text, tied", "lora, recomputed"),
    "tp 2 x fsdp2 2": ("accumulated", "lora"),
    "cp 2": ("recomputed", "accumulated", "text, tied", "text, lora"),
    "cp 2 x fsdp2 2": ("accumulated", "text, lora, recomputed"),
    "cp 2 x tp 2": ("recomputed", "lora"),
    "ep 2": ("recomputed", "accumulated", "text, tied", "lora, recomputed"),
    "ep 2 x fsdp2 2": ("accumulated", "text, lora, recomputed"),
    "ep 2 x tp 2": ("text, tied", "lora"),
    "pp 2, 1f1b": ("recomputed", "accumulated", "tied", "text, lora"),
    "pp 2, interleaved_1f1b": ("text, tied", "lora, recomputed"),
    "pp 2, zero_bubble": ("text, tied", "lora"),
    "pp 2, zbv": ("accumulated", "tied", "text, lora, recomputed"),
    "pp 2 x fsdp2 2": ("text, tied", "lora, recomputed"),
    "pp 2 x cp 2": ("recomputed", "text, lora"),
    "pp 2 x ep 2": ("accumulated", "lora"),
    "pp 2 x tp 2 x fsdp2 2": ("text, tied",),
}

WHY: dict[tuple[str, str], str] = {}
"""(layout, case) -> why it may exceed a bound. A row that does without standing here fails `make parity`."""


def unavailable(arrangement: Arrangement) -> str | None:
    """Why this machine cannot run an arrangement; None when it can."""
    if "parallel.nvme" not in arrangement.settings:
        return None
    from rayswift.parallel.deepspeed_ops import build, missing

    return build() if missing() else None


def train_cases(rank: int, layout: str, names: Sequence[str]) -> dict[str, Outcome]:
    """The outcome of each case on this rank, one after the other."""
    return {name: train(LAYOUTS[layout], CASES[name]) for name in names}


def train(arrangement: Arrangement, case: Case) -> Outcome:
    """The outcome of a case on this rank."""
    with tempfile.TemporaryDirectory() as folder:
        job = _job(arrangement, case, Path(folder))
        rank = dist.get_rank() if dist.is_initialized() else 0
        engine_class = plugins.load("parallel.engines", arrangement.engine)
        engine = engine_class(_model(arrangement, case), job, Seat(arrangement.layout, rank), torch.device("cpu"))
        return run_engine(engine, [Step(case.packing, case.micro_batches)] * STEPS, _method(case))


def expected(layout: str, case: str) -> Outcome:
    """What a bare loop gives for a row."""
    arrangement, chosen = LAYOUTS[layout], CASES[case]
    kind = (arrangement.arch, arrangement.layers, chosen.adapter, chosen.tied)
    return _expected(*kind, chosen.method, chosen.max_norm)


@cache
def _expected(arch: str, layers: int, adapter: str, tied: bool, method: str, max_norm: float | None) -> Outcome:
    case = Case(method, adapter, tied=tied, max_norm=max_norm)
    model = _model(Arrangement(Layout(), arch=arch, layers=layers), case)
    return run_reference(model, case.job(), STEPS, _method(case))


def _model(arrangement: Arrangement, case: Case) -> Any:
    lora = case.adapter != "full"
    return tiny_model(arrangement.arch, lora=lora, tied=case.tied, layers=arrangement.layers)


def _method(case: Case) -> Any:
    method_class = plugins.load("methods", case.method)
    return method_class(method_class.Config())


def _job(arrangement: Arrangement, case: Case, folder: Path) -> Job:
    """The job of a row; what DeepSpeed reads and writes lies in `folder`."""
    settings = dict(arrangement.settings)
    if arrangement.engine == "deepspeed":
        (folder / "zero.json").write_text(json.dumps({"zero_optimization": _ZERO, "gradient_clipping": "auto"}))
        settings["parallel.deepspeed"] = str(folder / "zero.json")
        if "parallel.nvme" in settings:
            settings["parallel.nvme"] = str(folder)
    return case.job(**settings)
