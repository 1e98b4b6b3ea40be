"""A base kept in 4 bits: how bitsandbytes packs it so that FSDP2 can shard it."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from rayswift.errors import ConfigError

if TYPE_CHECKING:
    from rayswift.config.job import ModelSpec


def quantized(spec: ModelSpec) -> dict[str, Any]:
    """What `from_pretrained` is told to keep the base of `spec` in 4 bits; nothing for one that is not quantized.

    Bytes are stored as if they were numbers of the compute dtype: sharding then moves them like any other parameter
    and never casts them, which would destroy them. Raises ConfigError without bitsandbytes.
    """
    if spec.quantization is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "needs bitsandbytes, which is not installed",
            path="model.quantization",
            value=spec.quantization,
            fix="pip install 'rayswift[qlora]' on every node",
        )
    import torch
    from transformers import BitsAndBytesConfig

    dtype: torch.dtype = getattr(torch, spec.dtype)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
    return {"quantization_config": config, "device_map": {"": "cpu"}}
