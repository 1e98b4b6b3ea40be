"""A tied embedding whose head is on another pipeline stage: two copies that stay equal, saved under one name."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from rayswift.parallel.tensor import unwrapped


class Tie:
    """This rank's copies, one or both. Equal at first and given the same gradient every step, they stay equal."""

    def __init__(self, embedding: Any, head: Any, names: tuple[str, str], group: dist.ProcessGroup) -> None:
        """`embedding` and `head` are modules, or None where another rank has them; `names` are those of their weights;
        `group` holds the ranks that have one."""
        self._ends = [end for end in (embedding, head) if end is not None]
        self._head, self._names, self._group = head, names, group

    @property
    def second(self) -> list[nn.Parameter]:
        """The head's copy, where this rank has it: a norm must not count it again."""
        return [] if self._head is None else [self._head.weight]

    def sum_gradients(self) -> None:
        """Give both copies the sum of their gradients. Called once per step by the ranks that have one or both."""
        grads = [_local(end.weight.grad) for end in self._ends if end.weight.grad is not None]
        if len(grads) == 2:  # a V-shaped schedule has the first and the last stage on one rank
            grads[0].add_(grads[1])
            grads[1].copy_(grads[0])
        elif grads:
            dist.all_reduce(grads[0], group=self._group)

    def joined(self, optim: dict[str, Any]) -> dict[str, Any]:
        """The optimizer's state with the head's under the embedding's name, as an uncut model has it."""
        return {self._joined_name(name): value for name, value in optim.items()}

    def parted(self, optim: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        """`joined` undone: the state under the names that this rank's `own` state has. Copies share no memory."""
        return {name: _copied(optim[self._joined_name(name)]) for name in own}

    def _joined_name(self, name: str) -> str:
        embedding, head = self._names
        return name.replace(f".{head}.", f".{embedding}.")


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def untie(model: nn.Module, ends: list[tuple[int, int]], rank: int) -> Tie | None:
    """This rank's end of the tie of a model whose head is its embedding, which gets a copy; None where it has no end.

    `ends` are the ranks of the first and of the last stage of each pipeline. Called by all ranks before the model is
    cut.
    """
    lm = unwrapped(model)
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    if head.weight is not embedding.weight:
        return None
    groups = {pair: dist.new_group(sorted(set(pair))) for pair in ends}
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    tied = embedding.weight
    pair = next((pair for pair in ends if rank in pair), None)
    if pair is None:
        return None
    if rank == pair[1]:
        head.weight = nn.Parameter(tied.detach().clone(), requires_grad=tied.requires_grad)
    if not tied.requires_grad:
        return None
    own = embedding if rank == pair[0] else None, head if rank == pair[1] else None
    return Tie(*own, (names[id(embedding)], names[id(head)]), groups[pair])
