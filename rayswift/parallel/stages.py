"""Cuts a Hugging Face model into pipeline stages that keep its names and its own forward code.

Read from transformers' pipeline plan: which modules come before the blocks, which list these are in, what comes after.
A stage is a view of the model in which the modules of other stages pass on what they get, so that masks, rotary
embeddings and everything else between blocks is computed by the model itself. Knows no architecture: a model that does
more to hidden states on their way than its modules do is found by sending some through a stage without any.

Shape legend: B sequences, t this rank's tokens of them, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rayswift.errors import PlanError
from rayswift.parallel.context import KEYWORD
from rayswift.parallel.tensor import unwrapped
from rayswift.planning.stages import stage_layers

Run = Callable[..., torch.Tensor]


class Skipped(nn.Module):
    """Stands for a module of another stage: gives back what it gets. Plain settings of a block stay readable."""

    def __init__(self, instead_of: nn.Module) -> None:
        super().__init__()
        for name, value in vars(instead_of).items():
            if not name.startswith("_") and isinstance(value, str | int | float | bool):
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first argument."""
        return args[0] if args else next(iter(kwargs.values()))


class Entrance(Skipped):
    """Stands for the first block of another stage: gives back what the stage received.

    Not what the model hands over: some scale embeddings before their first block, and would scale hidden states again.
    """

    received: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What was received."""
        return self.received


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a model are, by names below its base model, but the head's, which is below the model."""

    before: tuple[str, ...]
    blocks: str
    after: tuple[str, ...]
    head: str


class Stage(nn.Module):
    """One stage: tokens or hidden states [B, t, H] in, hidden states or, of the last, log-probabilities out."""

    def __init__(self, model: Any, num_blocks: int, *, first: bool, last: bool, run: Run) -> None:
        """`run(stage_forward, hidden, index)` computes micro-batch `index`: what to feed is known by the engine."""
        super().__init__()
        self.lm, self.first, self.last = model, first, last
        self._num_blocks, self._run = num_blocks, run
        self._entrance = next((module for module in model.modules() if isinstance(module, Entrance)), None)

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """What this stage makes of micro-batch `index`; the first stage gets the index for `x`, too."""
        return self._run(self, None if self.first else x, int(index))

    def hidden(self, **inputs: Any) -> torch.Tensor:
        """Hidden states behind the stage's last block."""
        states: torch.Tensor = self._call(self.lm.base_model, inputs).last_hidden_state
        return states

    def logits(self, **inputs: Any) -> torch.Tensor:
        """The model's logits."""
        found: torch.Tensor = self._call(self.lm, inputs).logits
        return found

    def _call(self, model: Any, inputs: dict[str, Any]) -> Any:
        part = inputs.get(KEYWORD)
        before = part.exchanges if part is not None else 0
        if self._entrance is not None:
            self._entrance.received = inputs["inputs_embeds"]
        out = model(**inputs)
        if part is not None:
            part.check(before + self._num_blocks)
        return out


def anatomy(model: nn.Module) -> Anatomy:
    """The parts of a model. Raises PlanError when the plan does not tell enough to cut it."""
    lm = unwrapped(model)
    base, name = lm.base_model, type(lm).__name__
    plan = [entry for entry in (getattr(base, "_pp_plan", None) or {}) if hasattr(base, entry)]
    lists = [entry for entry in plan if isinstance(getattr(base, entry), nn.ModuleList)]
    if len(lists) != 1:
        raise _refusal("transformers names no pipeline plan for it", name)
    where = plan.index(lists[0])
    head = next((key for key, module in lm._modules.items() if module is lm.get_output_embeddings()), None)
    if head is None:
        raise _refusal("its output head was not found", name)
    found = Anatomy(tuple(plan[:where]), plan[where], tuple(plan[where + 1 :]), head)
    known = (*(f"{lm.base_model_prefix}.{entry}." for entry in plan), f"{head}.")
    if stray := next((key for key, _ in lm.named_parameters() if not key.startswith(known)), None):
        raise _refusal(f"the pipeline plan does not say which stage {stray} belongs to", name)
    return found


def cut(model: nn.Module, mine: Sequence[int], num_stages: int, run: Run) -> list[Stage]:
    """The stages `mine` of a model; what belongs to no stage of this rank is dropped from `model` itself.

    Raises PlanError when there are more stages than blocks, or the plan does not tell how to cut.
    """
    lm, parts = unwrapped(model), anatomy(model)
    blocks = list(getattr(lm.base_model, parts.blocks))
    if len(blocks) < num_stages:
        raise PlanError(
            f"needs {num_stages} stages, but {type(lm).__name__} has {len(blocks)} blocks",
            path="parallel.pp",
            value=num_stages,
            fix="lower parallel.pp, or use parallel.schedule=1f1b",
        )
    _check_passes_on(lm, parts)
    layers = stage_layers(len(blocks), num_stages)
    stages = []
    for index in mine:
        first, last = index == 0, index == num_stages - 1
        view = _view(lm, parts, set(layers[index]), first=first, last=last)
        stages.append(Stage(view, len(layers[index]), first=first, last=last, run=run))
    owned = set().union(*(layers[index] for index in mine))
    _drop(lm, lm.base_model, parts, owned, first=0 in mine, last=num_stages - 1 in mine)
    return stages


def _check_passes_on(lm: Any, parts: Anatomy) -> None:
    """Raises PlanError when a stage that has nothing changes what it gets: between its modules the model does more."""
    view = _view(lm, parts, set(), first=False, last=False)
    nothing = Stage(view, 0, first=False, last=False, run=lambda *_: torch.empty(0))
    hidden_BtH = torch.randn(1, 4, lm.config.get_text_config().hidden_size)
    inputs = {"inputs_embeds": hidden_BtH, "position_ids": torch.arange(4)[None], "use_cache": False}
    try:
        with torch.no_grad():
            same = torch.equal(nothing.hidden(**inputs), hidden_BtH)
    except Exception as error:
        raise _refusal("it does not run without its embedding", type(lm).__name__) from error
    if not same:
        raise _refusal("it changes hidden states between its modules", type(lm).__name__)


def _view(lm: Any, parts: Anatomy, owned: set[int], *, first: bool, last: bool) -> Any:
    """A copy of the model's outer modules that shares the blocks `owned` and skips the others."""
    view, base = _shallow(lm), _shallow(lm.base_model)
    base._modules[parts.blocks] = nn.ModuleList(base._modules[parts.blocks])
    view._modules[lm.base_model_prefix] = base
    _drop(view, base, parts, owned, first=first, last=last)
    return view


def _shallow(module: nn.Module) -> Any:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _drop(lm: Any, base: Any, parts: Anatomy, owned: set[int], *, first: bool, last: bool) -> None:
    """Skip, in place, what another stage computes. A block keeps its number: models look their settings up by it."""
    blocks = base._modules[parts.blocks]
    for number, block in enumerate(blocks):
        if number not in owned:
            blocks[number] = Skipped(block) if first or number else Entrance(block)
    for name in (() if first else parts.before) + (() if last else parts.after):
        base._modules[name] = Skipped(base._modules[name])
    if not last:
        lm._modules[parts.head] = Skipped(lm._modules[parts.head])


def _refusal(rule: str, architecture: str) -> PlanError:
    return PlanError(f"cannot cut {architecture}: {rule}", path="parallel.pp",
                     fix="use parallel.dp_shard or parallel.tp instead")  # fmt: skip
