"""What vLLM cannot do on every CPU. Knows formats of weights and instruction sets; imports no vLLM."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

_PACKED = "pack-quantized"  # compressed-tensors' name for integer weights beside activations that are not quantized


def is_packed(folder: str | os.PathLike[str]) -> bool:
    """Whether a model folder has packed integer weights (gptq, awq)."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return bool(config.get("quantization_config", {}).get("format") == _PACKED)
    except (OSError, ValueError, AttributeError):
        return False  # whoever loads it says what is wrong with it


def lacks_packed() -> str | None:
    """Why this machine's CPU cannot run packed weights in vLLM; None where it can. (vllm 0.32)"""
    import torch

    if platform.machine().lower() not in ("x86_64", "amd64") or torch.cpu._is_avx512_supported():
        return None
    return "vLLM runs weights of gptq and awq on no CPU without AVX-512, and this one has none"
