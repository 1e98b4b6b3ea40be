"""The one form in which every engine hands out its state: full tensors' shards under Hugging Face names.

`model.NAME` and `optim.state.NAME.exp_avg`, as torch.distributed.checkpoint flattens them. A layout shows in the shards
alone, never in a name or a shape, so that a checkpoint of one layout loads under any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict


def engine_state(model: nn.Module, optimizer: torch.optim.Optimizer, *, full: bool) -> dict[str, Any]:
    """`{"model": ..., "optim": ...}` of what is trained; with an adapter (not `full`) the frozen base is left out."""
    state, optim = get_state_dict(model, optimizer, options=_options(full))
    if not full:  # a frozen head tied to the embedding comes along under its second name
        trained = {n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        state = {name: tensor for name, tensor in state.items() if name in trained}
    return {"model": state, "optim": optim}


def load_engine_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], *, full: bool
) -> None:
    """Take over a state of the structure that `engine_state` gives."""
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optim"],
        options=_options(full),
    )


def _options(full: bool) -> StateDictOptions:
    return StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True, strict=full)
