"""Tensor parallelism: transformers' own plan for an architecture, applied on our mesh, adapters included.

Knows the styles of transformers 5.17 and which of them need care in training; knows no architecture. What the plan
leaves out is replicated. Two things differ from `apply_tensor_parallelism`: the head keeps its share of the vocabulary
(see `logprobs.py`), so that full logits never exist on a rank, and norms inside the sharded region get their gradients
summed once per step: the hook of transformers would sum an accumulated gradient again with every micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from rayswift.errors import PlanError
from rayswift.parallel.logprobs import Vocabulary

_GATHERED = {"colwise_gather_output", "colwise_rep"}
_WHOLE_OUTSIDE = {*_GATHERED, "rowwise_split_input", "rowwise_rep"}  # what goes in and what comes out is replicated
_PARTIAL, _MLA = "replicated_with_grad_allreduce", "mla_kv_a_proj"


def apply_tensor_parallel(model: nn.Module, mesh: DeviceMesh, *, skip: str | None = None) -> list[nn.Module]:
    """Shard `model` over `mesh` in place; the modules whose own gradients each rank holds a part of.

    `model` is a PreTrainedModel or a PeftModel around one. Entries of the plan whose name contains `skip` are left out.
    Raises PlanError for an adapter that cannot be cut.
    """
    base = unwrapped(model)
    plan = {name: style for name, style in _plan(base).items() if skip is None or skip not in name}
    partial: list[nn.Module] = []
    for name, module in list(base.named_modules()):
        style = _style(name, plan, is_weight=False)
        if style == _MLA:
            module.config = base.config.get_text_config()  # where the style looks up which columns are rotary
        if style == _PARTIAL:
            partial.append(module)
        elif hasattr(module, "base_layer"):
            _apply_to_adapter(module, style, mesh)
        elif not name.endswith("base_layer") and ".lora_" not in name:
            _apply(module, style, _own_styles(name, module, plan), mesh)
    base.tie_weights()
    return partial


def unwrapped(model: nn.Module) -> Any:
    """The PreTrainedModel itself, inside a PeftModel or not."""
    inner: Any = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def vocabulary_of(model: nn.Module) -> Vocabulary | None:
    """The share of the vocabulary that this rank's head has, None where every rank computes whole logits."""
    weight = getattr(unwrapped(model).get_output_embeddings(), "weight", None)
    names = weight.device_mesh.mesh_dim_names if isinstance(weight, DTensor) else None
    if weight is None or not names or "tp" not in names:
        return None
    mesh = weight.device_mesh["tp"]
    return Vocabulary(mesh, mesh.get_local_rank() * -(-weight.shape[0] // mesh.size()))


def _plan(base: Any) -> dict[str, str]:
    """The model's plan with the head left spread out, and with a tied embedding spread like the head."""
    plan = dict(base.tp_plan)
    names = {id(module): name for name, module in base.named_modules()}
    head = names.get(id(base.get_output_embeddings()), "")
    if plan.get(head) in _GATHERED:
        plan[head] = "colwise"
        if base.get_output_embeddings().weight is base.get_input_embeddings().weight:
            plan[names[id(base.get_input_embeddings())]] = "embedding_rowwise"
    return plan


def _style(name: str, plan: Mapping[str, str], *, is_weight: bool) -> str | None:
    from transformers.distributed.tensor_parallel import _get_parameter_tp_plan

    style: str | None = _get_parameter_tp_plan(parameter_name=name, tp_plan=dict(plan), is_weight=is_weight)
    return style


def _own_styles(name: str, module: nn.Module, plan: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(parameter, style) of each own parameter that the plan shards: by its own name, or by its module's."""
    for parameter, _ in list(module.named_parameters(recurse=False)):
        style = _style(f"{name}.{parameter}" if name else parameter, plan, is_weight=True)
        if style is not None:
            yield parameter, style


def _apply(module: nn.Module, style: str | None, own: Iterator[tuple[str, str]], mesh: DeviceMesh) -> None:
    """Shard a module's parameters, then exchange its inputs and outputs as its style says."""
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    for parameter, parameter_style in own:
        trained = module.get_parameter(parameter).requires_grad
        ALL_PARALLEL_STYLES[parameter_style].shard_param(module, parameter, mesh)
        module.get_parameter(parameter).requires_grad_(trained)
    if style is not None:
        ALL_PARALLEL_STYLES[style].install_forward(module, mesh)


def _apply_to_adapter(module: Any, style: str | None, mesh: DeviceMesh) -> None:
    """A low-rank pair follows its base layer: B is cut like an output, A like an input, the other one is replicated."""
    if style is None:
        return
    refuse_adapted_experts(module, "tp")
    sharded = {"colwise": "lora_B", "packed_colwise": "lora_B", "rowwise": "lora_A"}.get(style)
    if sharded is None and style not in _WHOLE_OUTSIDE:  # shards nothing, changes what flows through the whole
        _apply(module, style, iter(()), mesh)
        return
    _apply(module.base_layer, style, _every(module.base_layer, style), mesh)
    for layer in getattr(module, sharded).values() if sharded else ():
        _apply(layer, style, _every(layer, style), mesh)


def refuse_adapted_experts(module: nn.Module, axis: str) -> None:
    """Raises PlanError for a low-rank pair on stacked weights: its B holds the rows of all experts, in peft's order."""
    if hasattr(module, "parameter_name"):
        raise PlanError(
            f"puts a low-rank pair on stacked experts, which parallel.{axis} cannot cut",
            path="adapter.targets",
            fix="name the attention's layers, such as q_proj and o_proj, or use parallel.dp_shard alone",
        )


def _every(module: nn.Module, style: str) -> Iterator[tuple[str, str]]:
    return iter([(name, style) for name, _ in module.named_parameters(recurse=False)])


def sum_partial_gradients(modules: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Sum over `mesh` the gradients that each rank has a part of; once per step, whatever was accumulated.

    They are vectors of a head's size, two per block: sent as one.
    """
    grads = [p.grad for module in modules for p in module.parameters(recurse=False) if p.grad is not None]
    locals_ = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    if not locals_:
        return
    together = torch.cat([local.flatten() for local in locals_])
    torch.distributed.all_reduce(together, group=mesh.get_group())
    for local, part in zip(locals_, together.split([local.numel() for local in locals_]), strict=True):
        local.copy_(part.view_as(local))


def check_agreement(model: nn.Module, mesh: DeviceMesh) -> bool:
    """Whether gradients could be compared: False where one is not finite. Called by all ranks, before the first step.

    Raises PlanError when a gradient that should be the same on all ranks of `mesh` is not. Then a parameter is used
    inside the sharded region and the plan of its architecture does not say so: each rank has a part of its gradient,
    and training would go on, wrong by that. A part differs by as much as itself, rounding by far less.
    """
    parts = {name: _samples(p.grad, mesh) for name, p in model.named_parameters() if _is_whole(p.grad)}
    if not all(bool(part.isfinite().all()) for part in parts.values()):
        return False
    largest = max((float(part.norm()) for part in parts.values()), default=0.0)
    for name, part in parts.items():
        apart = float((part - part.mean(0)).norm())
        if apart > 0.05 * float(part.norm()) and apart > 1e-4 * largest:
            raise PlanError(
                f"computes only a part of the gradient of {name} on each worker: transformers' tensor parallel plan of "
                "this architecture leaves it out",
                path="parallel.tp",
                value=mesh.size(),
                fix="use parallel.dp_shard instead of parallel.tp",
            )
    return True


def _is_whole(grad: torch.Tensor | None) -> bool:
    """Whether a gradient is not cut by tensor parallelism."""
    if not isinstance(grad, DTensor):
        return grad is not None
    names = grad.device_mesh.mesh_dim_names or ()
    return not any(
        name == "tp" and not place.is_replicate() for name, place in zip(names, grad.placements, strict=True)
    )


def _samples(grad: Any, mesh: DeviceMesh) -> torch.Tensor:
    """Up to about a thousand elements of a gradient on each rank of `mesh`, a row per rank, in float32."""
    local = (grad.to_local() if isinstance(grad, DTensor) else grad).flatten()
    own = local[:: max(1, len(local) // 1024)].float().contiguous()
    rows = [torch.empty_like(own) for _ in range(mesh.size())]
    torch.distributed.all_gather(rows, own, group=mesh.get_group())
    return torch.stack(rows)
