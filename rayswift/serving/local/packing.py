"""The weights of linear layers in the layout that oneDNN multiplies from, for models that answer on a CPU.

torch hands a linear layer of float32 to MKL, which rearranges the whole weight in every call and multiplies few rows in
one thread: on two cores eight rows cost 1.5 to 2.9 times one. oneDNN keeps its layout and shares few rows out among the
threads: there they cost 0.8 to 1.4 times that one. With a single thread one row is slower by it, eight not faster.

The operators are those Inductor puts into a frozen graph (torch/_inductor/fx_passes/mkldnn_fusion.py of torch 2.13).
They are not documented: whether a model computes with them what it computed before is tried, or it stays as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

_NUM_TRIED_TOKENS = 8
_TOLERANCE = 1e-3
"""Of the largest logit. Random models of 64 layers differ by 1e-6, and by more where rounding picks another expert."""
_log = logging.getLogger("rayswift.serving")


class PackedLinear(nn.Module):
    """A linear layer for inference. Its weight keeps type and shape, but only oneDNN can read it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        return result

    def unpacked(self) -> nn.Linear:
        """The layer that this was made from."""
        weight = self.weight.detach().to_dense()
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return linear


@torch.inference_mode(False)
@torch.no_grad()
def pack(model: PreTrainedModel) -> int:
    """Pack the linear layers of a language model in place, where that is faster; how many.

    Needs memory for one layer more, and for a head whose weight is that of the embeddings a second time.
    """
    if model.device.type != "cpu" or model.dtype != torch.float32 or torch.get_num_threads() < 2:
        return 0
    packed = list[str]()
    try:
        names, before_TV = _used(model)
        for name in names:
            model.set_submodule(name, PackedLinear(_linear(model, name)))
            packed.append(name)
        off = float((_logits(model) - before_TV).abs().max() / before_TV.abs().max())
        problem = None if off <= _TOLERANCE else f"logits are off by {off:.1g} of their size"
    except Exception as error:  # an operator that is not there, or a model that reads the weight itself
        problem = f"{type(error).__name__}: {error}"
    if problem is None:
        return len(packed)
    _log.warning("the weights stay as they are, with which several answers at a time are slower: %s", problem)
    _unpack(model, packed)
    return 0


def _unpack(model: PreTrainedModel, names: Sequence[str]) -> None:
    for name in names:
        layer: Any = model.get_submodule(name)
        model.set_submodule(name, layer.unpacked())


def _used(model: PreTrainedModel) -> tuple[list[str], torch.Tensor]:
    """The plain linear layers that a text passes through, which a trial therefore covers, and its logits_TV."""
    used = dict[str, None]()

    def note(name: str) -> Any:
        return lambda *_: used.setdefault(name)

    plain = [(name, module) for name, module in model.named_modules() if _is_plain(module)]
    hooks = [module.register_forward_pre_hook(note(name)) for name, module in plain]
    try:
        logits_TV = _logits(model)
    finally:
        for hook in hooks:
            hook.remove()
    return list(used), logits_TV


def _is_plain(module: nn.Module) -> bool:
    """Whether nothing stands between the module and its weight: quantization, or memory elsewhere, would."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is nn.Linear and not hooked and type(module.weight) is nn.Parameter


def _linear(model: PreTrainedModel, name: str) -> nn.Linear:
    found = model.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found


def _logits(model: PreTrainedModel) -> torch.Tensor:
    vocab_size = model.config.get_text_config().vocab_size
    ids_1T = torch.arange(_NUM_TRIED_TOKENS)[None] % vocab_size
    logits_TV: torch.Tensor = model(input_ids=ids_1T, use_cache=False).logits[0].float()
    return logits_TV
