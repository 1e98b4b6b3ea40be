"""What vLLM cannot do on every CPU. Knows formats of weights and instruction sets; imports no vLLM."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Of vLLM's attention on a CPU. (vllm 0.32)"""
_PACKED = "pack-quantized"  # compressed-tensors' name for integer weights beside activations that are not quantized


def is_packed(folder: str | os.PathLike[str]) -> bool:
    """Whether a model folder has packed integer weights (gptq, awq)."""
    try:
        return bool(_config(folder).get("quantization_config", {}).get("format") == _PACKED)
    except (OSError, ValueError, AttributeError):
        return False  # whoever loads it says what is wrong with it


def lacks_heads(folder: str | os.PathLike[str]) -> str | None:
    """Why vLLM has no attention on a CPU for the model in a folder; None where it has, or the folder does not say."""
    try:
        config = _config(folder)
        text = config.get("text_config", config)
        size = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    except (OSError, ValueError, AttributeError, LookupError, TypeError):
        return None
    if size in _HEAD_SIZES or "kv_lora_rank" in text:  # the latter's heads are of other sizes
        return None
    return f"vLLM's attention on a CPU has no kernel for heads of {size}"


def _config(folder: str | os.PathLike[str]) -> Any:
    return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))


def lacks_packed() -> str | None:
    """Why this machine's CPU cannot run packed weights in vLLM; None where it can. (vllm 0.32)"""
    import torch

    if platform.machine().lower() not in ("x86_64", "amd64") or torch.cpu._is_avx512_supported():
        return None
    return "vLLM runs weights of gptq and awq on no CPU without AVX-512, and this one has none"
