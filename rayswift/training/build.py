"""Builds a rank's model, method and engine from a job; the order of application is visible here."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from rayswift import plugins
from rayswift.config.job import Job
from rayswift.methods import Method
from rayswift.parallel.engine import Engine
from rayswift.parallel.precision import compute_dtype
from rayswift.planning.layout import Seat
from rayswift.planning.planner import Plan


def build_method(job: Job) -> Method:
    """The job's method with its validated options."""
    method_class = plugins.load("methods", job.method.name, path="method.name")
    method: Method = method_class(method_class.Config.model_validate(job.method.options))
    return method


def build_engine(job: Job, plan: Plan, seat: Seat, device: torch.device) -> Engine:
    """Load, adapt, then hand over to the engine, which spreads, shards and builds the optimizer.

    Of several ranks the first one reads the weights where the engine fills the others; a packed base is small, and
    what packing it leaves beside the weights travels no other way, so each rank reads that.
    """
    from rayswift.models.adapters import add_lora, freeze_parts
    from rayswift.models.loading import load_model, shape_model

    engine_class = plugins.load("parallel.engines", plan.engine, path="parallel.engine")
    reads = seat.rank == 0 or not engine_class.fills or job.model.quantization is not None
    dtype = torch.float32 if job.adapter is None else compute_dtype(job.model.dtype)
    base = load_model(job.model, dtype=dtype) if reads else shape_model(job.model, dtype=dtype)
    freeze_parts(base, job.model.freeze)
    model = base if job.adapter is None else add_lora(base, job.adapter, job.train.seed, freeze=job.model.freeze)
    engine: Engine = engine_class(model, job, seat, device)
    return engine


@cache
def base_sha256(model_path: str) -> str:
    """The hash of the base model's weights, read once per process: minutes for a large one."""
    from rayswift.models.adapters import weights_sha256
    from rayswift.models.loading import local_folder

    return weights_sha256(local_folder(model_path))


def broadcast(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Rank 0's value on every rank."""
    box = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0, group=group)
    return box[0]
