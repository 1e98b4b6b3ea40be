"""What a layout asks of a model: each rule one PlanError with path, value, rule and the values that would work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import gcd

from rayswift.config.job import Job, is_hub_id
from rayswift.errors import PlanError
from rayswift.planning.hardware import ClusterSpec
from rayswift.planning.layout import Layout
from rayswift.planning.model_plan import ModelPlan
from rayswift.planning.model_shape import ModelShape
from rayswift.planning.stages import STAGES_PER_RANK


def check_layout(job: Job, shape: ModelShape, layout: Layout, model_plan: Callable[[], ModelPlan]) -> None:
    """Raises PlanError for a model that cannot be cut like this. `model_plan` is asked only where one is cut at all."""
    _check_towers(job, shape, layout)
    if layout.tp > 1:
        _check_tp(job, shape, layout, model_plan())
    if layout.pp > 1:
        _check_pp(job, shape, layout, model_plan())
    if layout.ep > 1:
        _check_ep(job, shape, layout, model_plan())
    if layout.cp > 1:
        _check_cp(job, shape, layout)


def check_batch(job: Job, layout: Layout) -> None:
    """Raises PlanError when the global batch does not split evenly over the data ranks."""
    batch, ranks = job.train.global_batch_size, layout.data_size
    if batch % ranks:
        near = max(ranks, round(batch / ranks) * ranks)
        raise PlanError(
            f"does not split over {ranks} data ranks",
            path="train.global_batch_size",
            value=batch,
            fix=f"use a multiple of {ranks}, such as {near}",
        )


def check_dtype(job: Job, cluster: ClusterSpec) -> None:
    """Raises PlanError for FP8 where no device multiplies in it. A GPU that is not known may."""
    if job.model.dtype != "float8":
        return
    without = cluster.gpu.name if cluster.gpu and not cluster.gpu.fp8_tflops else cluster.device
    if cluster.device in ("cpu", "mps", "npu") or (cluster.gpu and not cluster.gpu.fp8_tflops):
        raise PlanError(
            f"needs a GPU that multiplies in FP8, such as H100, and {without} does not",
            path="model.dtype",
            value="float8",
            fix="use model.dtype=bfloat16",
        )


def model_name(job: Job) -> str:
    """The model as people call it: the last part of its path, without a revision."""
    path = job.model.path
    name = path.rpartition("@")[0] if "@" in path and is_hub_id(path) else path
    return name.rstrip("/").rpartition("/")[2] or path


def tensor_sizes(shape: ModelShape, layout: Layout) -> dict[str, int]:
    """The sizes that tensor parallelism cuts, by name. Experts that are spread are not cut as well."""
    inner = {"intermediate_size": shape.intermediate_size}
    if shape.num_experts > 1:
        size = shape.expert_size or shape.intermediate_size
        inner = {} if layout.ep > 1 else {"moe_intermediate_size": size}
    return {"num_kv_heads": shape.num_kv_heads, "num_attention_heads": shape.num_heads, **inner}


def divisors(number: int) -> list[int]:
    """All divisors, the smallest first."""
    return [n for n in range(1, number + 1) if number % n == 0]


def one_of(values: Iterable[int]) -> str:
    """`1, 2, 4 or 8`."""
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last


def _check_towers(job: Job, shape: ModelShape, layout: Layout) -> None:
    """The plans of transformers cut language models; a tower beside one would be cut by nobody's plan."""
    for axis in ("tp", "pp", "cp", "ep"):
        size = getattr(layout, axis)
        if shape.towers and size > 1:
            raise PlanError(
                f"cuts only the language model of {model_name(job)}, which has a {' and '.join(shape.towers)} tower",
                path=f"parallel.{axis}",
                value=size,
                fix=f"use parallel.{axis}=1; parallel.dp_shard shards towers too",
            )


def _check_tp(job: Job, shape: ModelShape, layout: Layout, plan: ModelPlan) -> None:
    if not plan.tp:
        raise _no_plan("tp", layout.tp, "tensor", shape, "dp_shard shards its parameters too")
    sizes = tensor_sizes(shape, layout)
    works = divisors(gcd(*sizes.values()))
    for name, size in sizes.items():
        if size % layout.tp:
            raise PlanError(
                f"does not divide {name}={size} of {model_name(job)}",
                path="parallel.tp",
                value=layout.tp,
                fix=f"use {one_of(works)}",
            )


def _check_pp(job: Job, shape: ModelShape, layout: Layout, plan: ModelPlan) -> None:
    if not plan.pp:
        raise _no_plan("pp", layout.pp, "pipeline", shape, "dp_shard shards its parameters too")
    per_worker = STAGES_PER_RANK[job.parallel.schedule]
    if layout.pp * per_worker > shape.num_layers:
        each = f" ({per_worker} on each worker with parallel.schedule={job.parallel.schedule})"
        most = shape.num_layers // per_worker
        raise PlanError(
            f"makes {layout.pp * per_worker} stages{each if per_worker > 1 else ''} of the {shape.num_layers} layers "
            f"of {model_name(job)}",
            path="parallel.pp",
            value=layout.pp,
            fix=f"use at most {most}" if most else "use parallel.schedule=1f1b with parallel.pp=1",
        )


def _check_ep(job: Job, shape: ModelShape, layout: Layout, plan: ModelPlan) -> None:
    if shape.num_experts == 1:
        raise PlanError(f"has nothing to spread: {model_name(job)} is no mixture of experts", path="parallel.ep",
                        value=layout.ep, fix="use parallel.ep=1")  # fmt: skip
    if not plan.ep:
        raise _no_plan("ep", layout.ep, "expert", shape, "dp_shard shards experts too")
    if shape.num_experts % layout.ep:
        raise PlanError(
            f"does not divide the {shape.num_experts} experts of {model_name(job)}",
            path="parallel.ep",
            value=layout.ep,
            fix=f"use {one_of(divisors(shape.num_experts))}",
        )


def _check_cp(job: Job, shape: ModelShape, layout: Layout) -> None:
    """Each rank of a group computes a part of the heads for all tokens: query heads divide, keys are repeated."""
    heads = shape.num_heads // layout.tp
    if heads % layout.cp:
        left = f"that parallel.tp={layout.tp} leaves " if layout.tp > 1 else ""
        raise PlanError(
            f"does not divide the {heads} attention heads {left}of {model_name(job)}",
            path="parallel.cp",
            value=layout.cp,
            fix=f"use {one_of(divisors(heads))}",
        )
    length = job.data.max_length
    if length % layout.cp:
        near = max(layout.cp, length - length % layout.cp)
        raise PlanError(
            f"is not a multiple of parallel.cp={layout.cp}, over whose workers a sequence is cut",
            path="data.max_length",
            value=length,
            fix=f"use {near}",
        )


def _no_plan(axis: str, size: int, kind: str, shape: ModelShape, instead: str) -> PlanError:
    return PlanError(
        f"has no way to cut {shape.architecture}: transformers has no {kind} parallel plan for it",
        path=f"parallel.{axis}",
        value=size,
        fix=f"use parallel.{axis}=1; {instead}",
    )
