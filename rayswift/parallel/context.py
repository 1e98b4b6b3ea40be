"""Context parallelism: each rank computes its part of the tokens, and for attention its part of the heads.

Ulysses (arXiv 2309.14509): before attention an all-to-all trades tokens for heads, after it back again, so that
attention itself is the ordinary one over whole sequences, packed or not. It goes in through transformers' attention
interface; what it needs travels as a keyword argument, so that a recomputed block finds it again. A model that does not
hand keyword arguments down to its attention is refused there, not computed wrongly; so is one of whose blocks some
have no attention: they would see a part of the tokens only.

Shape legend: B sequences, T tokens, t this rank's part of them, H heads, h this rank's part, D head dimension.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from rayswift.data.types import PackedBatch
from rayswift.errors import PlanError

NAME = "rayswift_ulysses"
KEYWORD = "context_part"
_KINDS = {"full_attention", "sliding_attention"}
_NOT_COMPUTED = ("softcap", "s_aux")  # what some attentions add and the one below has not


@dataclass
class ContextPart:
    """One rank's part of a batch: whose tokens, of how many, and the masks that its layers share."""

    mesh: DeviceMesh
    position_ids_BT: torch.Tensor
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)
    exchanges: int = 0
    """How often tokens were traded for heads so far."""

    def check(self, num_blocks: int) -> None:
        """Raises PlanError when fewer than `num_blocks` blocks that were computed traded tokens for heads."""
        if self.exchanges < num_blocks:
            raise _refusal(f"has {num_blocks - self.exchanges} blocks without attention", "this model")

    def cut(self, tensor_BT: torch.Tensor) -> torch.Tensor:
        """This rank's tokens [B, t]."""
        return tensor_BT.chunk(self.mesh.size(), dim=1)[self.mesh.get_local_rank()]

    def join(self, tensor_Bt: torch.Tensor) -> torch.Tensor:
        """All ranks' tokens [B, T]. Backward each rank takes its own: all of them compute the same from the whole."""
        return _Join.apply(tensor_Bt, self.mesh)  # type: ignore[no-any-return,no-untyped-call]

    def mask(self, window: int | None) -> torch.Tensor | None:
        """Which token sees which, [B, 1, T, T]: earlier ones of the same document. None where causal says it all."""
        if window not in self.masks:
            self.masks[window] = document_mask(self.position_ids_BT, window)
        return self.masks[window]


def use_ulysses(model: Any) -> None:
    """Make the model's attention trade tokens for heads. Raises PlanError for a model whose attention is its own."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _window)
    with suppress(ValueError):
        model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:  # of some models transformers only logs that it did nothing
        raise _refusal("has an attention that cannot be exchanged", type(model).__name__)
    if other := set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _KINDS:
        raise _refusal(f"has blocks with {', '.join(sorted(other))}", type(model).__name__)


def pad_to(batch: PackedBatch, multiple: int) -> PackedBatch:
    """The batch with T a multiple: what is added is a document of its own that counts nothing."""
    missing = -batch.input_ids_BT.shape[1] % multiple
    if not missing:
        return batch

    def longer(tensor_BT: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(tensor_BT, (0, missing))

    positions_BT = longer(batch.position_ids_BT)
    positions_BT[:, -missing:] = torch.arange(missing, device=positions_BT.device)
    return PackedBatch(longer(batch.input_ids_BT), positions_BT, longer(batch.targets_BT), longer(batch.weights_BT))


def document_mask(position_ids_BT: torch.Tensor, window: int | None) -> torch.Tensor | None:
    """True where a token [.., q, k] sees another. Documents begin where positions begin again at 0."""
    starts_BT = position_ids_BT == 0
    if window is None and not starts_BT[:, 1:].any():
        return None
    document_BT = starts_BT.cumsum(1)
    index_T = torch.arange(position_ids_BT.shape[1], device=position_ids_BT.device)
    distance_TT = index_T[:, None] - index_T[None]
    seen_TT = distance_TT >= 0 if window is None else (distance_TT >= 0) & (distance_TT < window)
    return (document_BT[:, :, None] == document_BT[:, None])[:, None] & seen_TT


def _window(*_: Any, local_size: int | None = None, **__: Any) -> torch.Tensor | None:
    """What stands for a mask: how far back a layer sees, None where it sees everything."""
    return None if local_size is None else torch.tensor(local_size)


def _attend(
    module: torch.nn.Module,
    query_BHtD: torch.Tensor,
    key_BHtD: torch.Tensor,
    value_BHtD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention output [B, t, H, D] as transformers wants it."""
    part: ContextPart | None = kwargs.get(KEYWORD)
    if part is None or (attention_mask is not None and attention_mask.ndim):
        raise _refusal("does not hand down what its attention needs", type(module).__name__)
    if name := next((name for name in _NOT_COMPUTED if kwargs.get(name) is not None), None):
        raise _refusal(f"has an attention with {name}", type(module).__name__)
    part.exchanges += 1
    heads = query_BHtD.shape[1]
    if key_BHtD.shape[1] % part.mesh.size():
        repeats = heads // key_BHtD.shape[1]
        key_BHtD, value_BHtD = (x.repeat_interleave(repeats, 1) for x in (key_BHtD, value_BHtD))
    query_BhTD, key_BhTD, value_BhTD = (
        _exchange(x, 1, 2, part.mesh) for x in (query_BHtD, key_BHtD, value_BHtD)
    )  # fmt: skip
    mask = part.mask(None if attention_mask is None else int(attention_mask))
    out_BhTD = torch.nn.functional.scaled_dot_product_attention(
        query_BhTD, key_BhTD, value_BhTD, attn_mask=mask, is_causal=mask is None, scale=scaling, dropout_p=dropout,
        enable_gqa=query_BhTD.shape[1] != key_BhTD.shape[1],
    )  # fmt: skip
    return _exchange(out_BhTD, 2, 1, part.mesh).transpose(1, 2).contiguous(), None


def _refusal(rule: str, who: str) -> PlanError:
    return PlanError(f"cannot cut the sequences of {who}: it {rule}", path="parallel.cp",
                     fix="use parallel.cp=1; parallel.dp_shard shards the model too")  # fmt: skip


def _exchange(x: torch.Tensor, split: int, join: int, mesh: DeviceMesh) -> torch.Tensor:
    """Part i of dim `split` goes to rank i; what the ranks sent is laid end to end along dim `join`."""
    parts: torch.Tensor = _AllToAll.apply(torch.stack(x.chunk(mesh.size(), dim=split)), mesh)  # type: ignore[no-untyped-call]
    return torch.cat(list(parts.unbind(0)), dim=join)


class _AllToAll(torch.autograd.Function):
    """Row i of the first dim goes to rank i; backward it comes back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        ctx.mesh = mesh
        return _all_to_all(x, mesh)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_to_all(grads[0], ctx.mesh), None


def _all_to_all(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, x.contiguous(), group=mesh.get_group())
    return received


class _Join(torch.autograd.Function):
    """All ranks' parts of dim 1 in order; backward the own part of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        ctx.mesh = mesh
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(mesh.size())]
        dist.all_gather(parts, x.contiguous(), group=mesh.get_group())
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0].chunk(ctx.mesh.size(), dim=1)[ctx.mesh.get_local_rank()], None
