"""The forward pass every engine shares: tokens in, log-probabilities of the targets out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.distributed.device_mesh import DeviceMesh

from rayswift.data.types import PackedBatch
from rayswift.parallel.context import KEYWORD, ContextPart, pad_to
from rayswift.parallel.logprobs import Vocabulary, token_logprobs


def batch_logprobs(
    model: Any, batch: PackedBatch, *, vocabulary: Vocabulary | None = None, context: DeviceMesh | None = None
) -> torch.Tensor:
    """Log-probabilities [B, T] of the targets, the same on every rank that shares its vocabulary or context.

    No attention mask and no cache: with either, packed documents leak silently. Raises PlanError for a model of whose
    blocks some do not exchange what is outside of their part of the tokens.
    """
    length = batch.input_ids_BT.shape[1]
    if context is None:
        logits_BTV = model(
            input_ids=batch.input_ids_BT, position_ids=_positions(model, batch), use_cache=False, **batch.media
        ).logits
        return token_logprobs(logits_BTV, batch.targets_BT, vocabulary)
    batch = pad_to(batch, context.size())
    part = ContextPart(context, batch.position_ids_BT)
    logits_BtV = model(
        input_ids=part.cut(batch.input_ids_BT), position_ids=part.cut(batch.position_ids_BT), use_cache=False,
        **{KEYWORD: part},
    ).logits  # fmt: skip
    part.check(model.config.get_text_config().num_hidden_layers)
    return part.join(token_logprobs(logits_BtV, part.cut(batch.targets_BT), vocabulary))[:, :length]


def _positions(model: Any, batch: PackedBatch) -> torch.Tensor:
    """As `PackedBatch.positions`, and with axes wherever the model has them.

    A model that has such axes needs them for text too, whose positions are the same on each: given [B, T] it lets
    packed documents see each other.
    """
    found = batch.positions()
    return found.expand(1 + _NUM_AXES, *found.shape) if found.ndim == 2 and _has_axes(model) else found


_NUM_AXES = 3  # time, height, width: of every model that transformers has
_AXES: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def _has_axes(model: Any) -> bool:
    """Whether the model computes positions of images on several axes; looked for once per model."""
    if model not in _AXES:
        _AXES[model] = any(hasattr(module, "get_rope_index") for module in model.modules())
    return _AXES[model]


def to_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """The batch on a device."""
    if device.type == "cpu":
        return batch

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: moved(one) for name, one in value.items()}
        return None if value is None else value.to(device, non_blocking=True)

    return type(batch)(**{f.name: moved(getattr(batch, f.name)) for f in fields(batch)})


_ROWS = ("input_ids_BT", "position_ids_BT", "targets_BT", "weights_BT")


def alike(batches: Sequence[PackedBatch], *, count: int, multiple_of: int = 1) -> list[PackedBatch]:
    """At least `count` micro-batches of one shape, T a multiple; rows and batches that are added count nothing."""
    rows = max(batch.input_ids_BT.shape[0] for batch in batches)
    length = max(batch.input_ids_BT.shape[1] for batch in batches)
    length += -length % multiple_of
    same = [_grown(batch, rows, length) for batch in batches]
    empty = replace(same[0], weights_BT=torch.zeros_like(same[0].weights_BT))
    return same + [empty] * (count - len(same))


def _grown(batch: PackedBatch, rows: int, length: int) -> PackedBatch:
    batch = pad_to(batch, length) if batch.input_ids_BT.shape[1] < length else batch
    missing = rows - batch.input_ids_BT.shape[0]
    if not missing:
        return batch
    parts: dict[str, Any] = {name: getattr(batch, name) for name in _ROWS}
    grown: dict[str, Any] = {
        name: torch.cat([part, torch.zeros_like(part[:1]).expand(missing, -1)]) for name, part in parts.items()
    }
    grown["position_ids_BT"][-missing:] = torch.arange(length, device=grown["position_ids_BT"].device)
    return PackedBatch(**grown)
