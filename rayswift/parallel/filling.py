"""Fills a model that one rank has read and the others have only the shape of, one tensor at a time.

Without it every rank would hold the whole base before it is sharded: eight workers of a node eight times its size. A
unit (a block, the rest) is handed to FSDP as soon as its weights are there, so that a rank never holds more than its
shards and what is under way. Names are those of the model before it was spread, cut or sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True)
class Unit:
    """A module that is sharded as one, and how. Units inside others come before them."""

    module: nn.Module
    shard: Callable[[], None]


@dataclass(frozen=True)
class _Sent:
    """A tensor that rank 0 is about to send."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Filler:
    """Rank 0's weights on their way to all ranks. Made before the model is taken apart, used once after it."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Called by all ranks. `device` is where a tensor is received, and stays until FSDP has its shard."""
        self._device = device
        sends = _is_shape_only_somewhere(model) and dist.get_rank() == 0  # else nothing is kept from being freed
        self._whole = dict(_tensors(model)) if sends else {}
        box: list[Any] = [[_Sent(name, tuple(part.shape), part.dtype) for name, part in self._whole.items()]]
        dist.broadcast_object_list(box, src=0)
        self._sent: list[_Sent] = box[0]

    def fill(self, model: nn.Module, units: Sequence[Unit]) -> None:
        """Give `model` (what this rank has of it) its weights, and shard each unit once it has its own."""
        filled: dict[int, nn.Parameter] = {}  # a tied parameter comes under two names and stays one
        waiting = _shard_whole(units)
        places = dict(_places(model))
        for sent in self._sent:
            tensor = self._receive(sent)
            if sent.name in places:
                _put(*places[sent.name], tensor, filled)
                waiting = _shard_whole(waiting)
        assert not waiting, f"{len(waiting)} units were never filled"

    def _receive(self, sent: _Sent) -> torch.Tensor:
        mine = self._whole.pop(sent.name, None)
        if mine is None:
            tensor = torch.empty(sent.shape, dtype=sent.dtype, device=self._device)
        else:
            tensor = mine.detach().to(self._device).contiguous()
        dist.broadcast(tensor, src=0)
        return tensor


def _is_shape_only_somewhere(model: nn.Module) -> bool:
    """Whether any rank has parameters without values. Called by all ranks."""
    found: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(found, any(parameter.is_meta for parameter in model.parameters()))
    return any(found)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, a tied one under each of its names, and the buffers that weight files have."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    yield from parameters.items()
    stored = model.state_dict().keys() - parameters.keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in stored)


def _places(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name in (*module._parameters, *module._buffers):
            yield f"{prefix}.{name}" if prefix else name, (module, name)


def _put(module: nn.Module, name: str, tensor: torch.Tensor, filled: dict[int, nn.Parameter]) -> None:
    """The value of one parameter that has only a shape, cut as its placements say; or of a buffer."""
    if name in module._buffers:
        buffer = module._buffers[name]
        assert buffer is not None
        buffer.copy_(tensor)
        return
    empty = module._parameters[name]
    if empty is None or not empty.is_meta:
        return
    if id(empty) not in filled:
        if isinstance(empty, DTensor):
            tensor = distribute_tensor(tensor, empty.device_mesh, empty.placements, src_data_rank=None)
        filled[id(empty)] = nn.Parameter(tensor, requires_grad=empty.requires_grad)
    module._parameters[name] = filled[id(empty)]


def _shard_whole(waiting: Sequence[Unit]) -> list[Unit]:
    """Shard the units that have all their weights; those that still wait. What FSDP has already is not looked at."""
    still = []
    for unit in waiting:
        if any(parameter.is_meta for parameter in unit.module.parameters()):
            still.append(unit)
        else:
            unit.shard()
    return still
