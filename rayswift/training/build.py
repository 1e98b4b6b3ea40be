"""Builds a rank's model, method and engine from a job; the order of application is visible here."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from rayswift import plugins
from rayswift.config.job import Job
from rayswift.data.types import PackedBatch
from rayswift.errors import ConfigError
from rayswift.methods import Method
from rayswift.parallel.engine import Engine
from rayswift.parallel.precision import compute_dtype
from rayswift.planning.layout import Seat
from rayswift.planning.planner import Plan

_LEAK_TOLERANCE = 1e-5  # nats; a fresh random model, the least sensitive there is, leaks 0.02 and more


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
    from rayswift.models.adapters import add_lora
    from rayswift.models.loading import load_model, shape_model

    engine_class = plugins.load("parallel.engines", plan.engine, path="parallel.engine")
    reads = seat.rank == 0 or not engine_class.fills or job.model.quantization is not None
    dtype = torch.float32 if job.adapter is None else compute_dtype(job.model.dtype)
    base = load_model(job.model, dtype=dtype) if reads else shape_model(job.model, dtype=dtype)
    model = base if job.adapter is None else add_lora(base, job.adapter, job.train.seed)
    engine: Engine = engine_class(model, job, seat, device)
    return engine


@cache
def base_sha256(model_path: str) -> str:
    """The hash of the base model's weights, read once per process: minutes for a large one."""
    from rayswift.models.adapters import weights_sha256
    from rayswift.models.loading import local_folder

    return weights_sha256(local_folder(model_path))


def refuse_leaking_packing(engine: Engine, job: Job) -> None:
    """Raise ConfigError when packed documents see each other in this model. Called by all ranks.

    Isolation rests on how transformers reads position ids, which some architectures ignore (state-space
    models, learned or relative positions). The loss would still fall and the model be useless, so one short
    document behind two different ones is compared before the first step: what it cannot see adds exactly nothing,
    in any precision.
    """
    first, other, document = torch.arange(5, 17), torch.arange(17, 5, -1), torch.arange(20, 28)
    behind_first = engine.forward(_packed(first, document))[0, len(first) : -1]
    behind_other = engine.forward(_packed(other, document))[0, len(other) : -1]
    difference = (behind_first - behind_other).abs().max()
    if float(difference) > _LEAK_TOLERANCE:
        raise ConfigError(
            f"lets packed documents see each other in this model (log-probabilities move by {float(difference):.2g})",
            path="data.packing",
            value=True,
            fix="set data.packing=false",
        )


def _packed(*documents_T: torch.Tensor) -> PackedBatch:
    """One sequence of whole documents without padding, every token weighing one."""
    ids_T = torch.cat(documents_T)
    return PackedBatch(
        input_ids_BT=ids_T[None],
        position_ids_BT=torch.cat([torch.arange(len(document_T)) for document_T in documents_T])[None],
        targets_BT=ids_T.roll(-1)[None],
        weights_BT=torch.ones(1, len(ids_T)),
    )


def broadcast(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Rank 0's value on every rank."""
    box = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0, group=group)
    return box[0]
