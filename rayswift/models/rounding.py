"""A model in memory rounded to another type: to what it would be if a folder of that type were loaded.

Knows which tensors transformers leaves in float32. Does not know what rounding costs: `export/verify.py` measures that.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rayswift.config.job import ModelSpec
from rayswift.models.loading import shape_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def round_weights(model: PreTrainedModel, path: str, dtype: torch.dtype) -> None:
    """Cast a model loaded in float32 from `path`, in place, to the types `from_pretrained(dtype=dtype)` gives it.

    Rotary frequencies and other buffers that are computed and not stored stay as they are computed there: frequencies
    in bfloat16 turn position 500 too far by up to 0.2 radians. So do tensors that transformers keeps in float32, such
    as what corrects the choice of experts.
    """
    import torch

    if dtype == torch.float32:
        return
    made = shape_model(ModelSpec(path=path), dtype=dtype)
    types = {name: tensor.dtype for name, tensor in (*made.named_parameters(), *made.named_buffers())}
    kept = re.compile("|".join(model._get_dtype_plan(dtype)).replace("*", ".*") or r"(?!)")
    stored = set(model.state_dict())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not (name in stored and kept.search(name)):
            tensor.data = tensor.data.to(types.get(name, dtype))
