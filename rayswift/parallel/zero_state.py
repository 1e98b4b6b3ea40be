"""The trained tensors of a model under DeepSpeed's ZeRO, read and written one at a time under Hugging Face names.

The form is that of `state.py`, so that a checkpoint of one engine loads under another. No rank ever holds the whole
model: a tensor is gathered, kept by the one rank it is dealt to, and handed on by that rank when it is loaded.
Knows where the stages of ZeRO keep weights and optimizer state; private names of DeepSpeed 0.19 are used here only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_WEIGHT = "weight"  # beside the names of optimizer state: the float32 weight itself


class ZeroState:
    """Every trained tensor of a DeepSpeed engine. All methods are called by all ranks."""

    def __init__(self, engine: Any, groups: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]]) -> None:
        """`groups` are the optimizer's before DeepSpeed took over, `names` those of their parameters."""
        self._engine, self._zero = engine, engine.optimizer
        module: nn.Module = engine.module
        self._aliases: dict[nn.Parameter, list[str]] = {}  # a tied weight has several names, the first is its own
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                self._aliases.setdefault(parameter, []).append(name)
        self._parameters = {found[0]: parameter for parameter, found in self._aliases.items()}
        saved = module.state_dict().keys()
        self._buffers = {name: buffer for name, buffer in module.named_buffers() if name in saved}
        self._settings = {
            f"param_groups.{name}.{key}": value
            for group, members in zip(groups, names, strict=True)
            for name in members
            for key, value in group.items()
            if key != "params"
        }
        optimizer = self._zero.optimizer
        if isinstance(optimizer, torch.optim.AdamW):
            self._kinds: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
        else:
            self._kinds = ("momentum_buffer",) if optimizer.defaults["momentum"] else ()
        sizes = {name: _shape(parameter).numel() for name, parameter in self._parameters.items()}
        self._owner = deal(sizes, dist.get_world_size())

    def state(self, *, full: bool) -> dict[str, Any]:
        """`{"model": ..., "optim": ...}` of the tensors dealt to this rank, on the CPU; buffers with a `full` model."""
        rank = dist.get_rank()
        model: dict[str, Any] = {}
        optim: dict[str, Any] = {}
        for name, parameter in self._parameters.items():
            mine = self._owner[name] == rank
            weight = self._read(parameter, _WEIGHT)
            if mine:
                model |= dict.fromkeys(self._aliases[parameter], weight)
            for kind in self._kinds:
                tensor = self._read(parameter, kind)
                if mine:
                    optim[f"state.{name}.{kind}"] = tensor
            if mine and "exp_avg" in self._kinds:
                optim[f"state.{name}.step"] = torch.tensor(float(self._num_steps()))
        if full and rank == 0:
            model |= {name: buffer.detach().cpu() for name, buffer in self._buffers.items()}
        lr = self._zero.param_groups[0]["lr"]
        settings = {key: lr if key.endswith(".lr") else value for key, value in self._settings.items()}
        return {"model": model, "optim": optim | settings}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over a state of the structure of `state`."""
        model, optim = state["model"], state["optim"]
        self._make_optimizer_state()
        self._free_weights()
        steps = 0.0
        for name, parameter in self._parameters.items():
            for kind in (_WEIGHT, *self._kinds):
                held = model.get(name) if kind == _WEIGHT else optim.get(f"state.{name}.{kind}")
                self._write(parameter, kind, self._handed_on(name, parameter, held))
            steps = max(steps, float(optim.get(f"state.{name}.step", 0.0)))
        for name, buffer in self._buffers.items():
            if dist.get_rank() == 0 and name in model:
                buffer.copy_(model[name])
            dist.broadcast(buffer, src=0)
        self._set_num_steps(steps)
        self._use_weights()

    def set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Train on from these float32 tensors, some or all, the same on all ranks."""
        self._free_weights()
        for name, tensor in weights.items():
            self._write(self._parameters[name], _WEIGHT, tensor)
        self._use_weights()

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole float32 tensor on the CPU) of each trained tensor on every rank, one at a time."""
        for parameter, names in self._aliases.items():
            weight = self._read(parameter, _WEIGHT)
            yield from ((name, weight) for name in names)

    def _read(self, parameter: nn.Parameter, kind: str) -> torch.Tensor:
        """A whole tensor on the CPU; zeros for optimizer state before the first step."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if kind == _WEIGHT:
            return _copied(safe_get_full_fp32_param(parameter))
        if not self._zero.optimizer.state:
            return torch.zeros(_shape(parameter))
        return _copied(safe_get_full_optimizer_state(parameter, kind))

    def _write(self, parameter: nn.Parameter, kind: str, tensor: torch.Tensor) -> None:
        """Replace this rank's part of a tensor. Stage 3 pads the last parts, which its own setter forgets."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if hasattr(parameter, "ds_tensor"):
            size = parameter.ds_tensor.numel()
            padded = torch.nn.functional.pad(tensor.flatten(), (0, size * dist.get_world_size() - tensor.numel()))
            part = padded.narrow(0, size * dist.get_rank(), size)
            if kind == _WEIGHT:
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, kind)
        elif kind == _WEIGHT:
            safe_set_full_fp32_param(parameter, tensor)
        else:
            safe_set_full_optimizer_state(parameter, tensor, kind)

    def _handed_on(self, name: str, parameter: nn.Parameter, held: torch.Tensor | None) -> torch.Tensor:
        """The tensor of the rank that it was dealt to, on every rank and on the engine's device."""
        device = self._engine.device
        if self._owner[name] == dist.get_rank():
            assert held is not None, f"{name} was dealt to this rank"
            tensor = held.to(device, torch.float32).contiguous()
        else:
            tensor = torch.empty(_shape(parameter), dtype=torch.float32, device=device)
        dist.broadcast(tensor, src=self._owner[name])
        return tensor

    @property
    def _is_stage_3(self) -> bool:
        return hasattr(self._zero, "fp32_partitioned_groups_flat")

    def _flat_partitions(self) -> list[torch.Tensor]:
        """What torch's optimizer steps: this rank's part of each group, in float32."""
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(self._zero, name):
                return list(getattr(self._zero, name))
        raise AssertionError(f"{type(self._zero).__name__} keeps its float32 weights in an unknown place")

    def _make_optimizer_state(self) -> None:
        """What the first step would make, so that there is something to write into."""
        state = self._zero.optimizer.state
        if state or not self._kinds:
            return
        for index, flat in enumerate(self._flat_partitions()):
            with self._swapped_in(index, keep=True):
                state[flat] = {kind: torch.zeros_like(flat.data) for kind in self._kinds}
                if "exp_avg" in self._kinds:
                    state[flat]["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        if not self._is_stage_3:
            self._zero._lazy_init_hp_params_optimizer_state()

    def _num_steps(self) -> float:
        return max((float(one["step"]) for one in self._zero.optimizer.state.values()), default=0.0)

    def _set_num_steps(self, steps: float) -> None:
        if "exp_avg" not in self._kinds:
            return
        total = torch.tensor(steps, device=self._engine.device)
        dist.all_reduce(total, op=dist.ReduceOp.MAX)  # a rank may have been dealt nothing
        for one in self._zero.optimizer.state.values():
            one["step"].fill_(float(total))

    def _swapped_in(self, index: int, *, keep: bool) -> Any:
        """A group of stage 3 is in memory meanwhile, if it lies on NVMe; `keep` writes it back."""
        return _SwappedIn(self._zero, index, keep) if self._is_stage_3 else _Nothing()

    def _free_weights(self) -> None:
        """Stage 3 gives up gathered weights, which would be outdated."""
        if self._is_stage_3:
            self._zero._partition_all_parameters()

    def _use_weights(self) -> None:
        """Compute with the float32 weights as they are now."""
        if not self._is_stage_3:
            self._zero.update_lp_params()
            return
        for index in range(len(self._zero.fp16_groups)):
            with self._swapped_in(index, keep=False):
                self._zero._reassign_or_swap_out_partitioned_parameters(index)
        self._zero._post_step(set())


class _SwappedIn:
    def __init__(self, zero: Any, index: int, keep: bool) -> None:
        self._zero, self._index, self._keep = zero, index, keep
        self._is_swapped = zero._swappable_optimizer_subgroup(index)

    def __enter__(self) -> None:
        if self._is_swapped:
            self._zero._optimizer_states_and_gradient_swap_in(self._index)

    def __exit__(self, *_: object) -> None:
        if self._is_swapped and self._keep:
            self._zero._optimizer_states_and_gradient_swap_out(self._index)
        elif self._is_swapped:
            self._zero._release_swap_buffers(self._index)


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def deal(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Name -> rank: the largest first, each to the rank that holds least so far; the same on every rank."""
    held = [0] * ranks
    owner: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner[name] = held.index(min(held))
        held[owner[name]] += sizes[name]
    return owner


def _shape(parameter: nn.Parameter) -> torch.Size:
    """The whole parameter's shape; stage 3 leaves an empty tensor in its place."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, sharing memory with nothing."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
