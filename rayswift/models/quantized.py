"""A base kept in 4 bits: how bitsandbytes packs it so that FSDP2 can shard it, and the numbers that it then stands for.

An adapter was trained on these, not on the numbers that were packed. Exports that compressed-tensors has packed are
unpacked here too.
"""

from __future__ import annotations

import importlib.util
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from rayswift.errors import ConfigError
from rayswift.models.quiet import quiet_progress

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

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


def unpack_on_the_way_in(config: PretrainedConfig) -> None:
    """Let transformers unpack what is stored in MXFP4 or FP8 blocks though a GPU here has kernels for it.

    For a model that is to be in float32: what stays packed is no number that can be cast.
    """
    said: Any = getattr(config, "quantization_config", None)
    if isinstance(said, dict) and said.get("quant_method") in ("mxfp4", "fp8"):
        said["dequantize"] = True


def decompress(model: PreTrainedModel) -> None:
    """Unpack in place what compressed-tensors has left packed until the first forward pass; any other model stays.

    In its own time and without its bar: the first pass may be one that RaySwift shows its own progress of.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if hasattr(model, "ct_decompress_hook") and hasattr(quantizer, "compressor"):
        with quiet_progress():
            quantizer.compressor.decompress_model(model)


def unquantized(model: PreTrainedModel, *, was_packed: bool) -> PreTrainedModel:
    """What the weights of a model that came packed stand for, as a plain model; one that did not as it is.

    What compressed-tensors has packed is saved with unpacked weights and the config of packed ones, which serving
    engines misread, and it rounds activations too. What transformers unpacked on the way in (MXFP4, FP8 in blocks) is
    packed again when it is saved, for the model keeps what loading did. The new model has the weights of the old one,
    which is not to be used any more.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    is_unpacked = was_packed and quantizer is None
    if getattr(quantizer, "compressor", None) is None and not is_unpacked:
        return model
    from accelerate import init_empty_weights

    decompress(model)
    config, kind = deepcopy(model.config), type(model)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        plain: PreTrainedModel = kind._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    own = model.state_dict()
    plain.load_state_dict({name: own[name] for name in plain.state_dict()}, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.eval()
    return plain


def compute_in_float32(packed: torch.nn.Module) -> None:
    """Let a packed model compute in float32, in place. Its bytes stay as they are: only the rest is cast."""
    import torch

    for module in packed.modules():
        if _is_packed(module):
            layer: Any = module
            layer.compute_dtype = layer.weight.quant_state.dtype = torch.float32
            layer.support_avx512bf16_for_cpu = False  # that kernel would repack the bytes and multiply in bfloat16
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point() and not hasattr(tensor, "quant_state"):
                tensor.data = tensor.data.float()


def unpack(packed: torch.nn.Module, model: torch.nn.Module) -> None:
    """Write what `packed` stands for over the numbers of `model`, the same model not packed."""
    import torch
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight
    from transformers.pytorch_utils import Conv1D

    with torch.no_grad():
        for name, module in packed.named_modules():
            own = model.get_submodule(name)
            for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if hasattr(tensor, "quant_state"):
                    unpacked = dequantize_bnb_weight(tensor)
                    tensor = unpacked.T if isinstance(own, Conv1D) else unpacked
                getattr(own, key).copy_(tensor)


def _is_packed(module: torch.nn.Module) -> bool:
    return hasattr(module._parameters.get("weight"), "quant_state")
