"""Tiny models of many text architectures, built from config: what the support matrix is computed with.

Knows the sizes each config class wants so that every axis can be cut in two, and gives values to what is zero or one
in a fresh model (biases, norms, multipliers, sinks), because a mistake hides behind zeros and ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

VOCAB_SIZE = 128
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8, "max_position_embeddings": 128,
    "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "sliding_window": 8,
}  # fmt: skip
_TWO_KINDS = ["sliding_attention", "full_attention"] * 2
_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "head_dim": None,
}  # fmt: skip
_ROUTED = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "initializer_range": 0.06,  # larger ones are ill-conditioned
}  # fmt: skip
_SCALED = {
    "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 0.5,
}  # fmt: skip

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bloom": {},
    "cohere": {"logit_scale": 0.5, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.5, "layer_types": _TWO_KINDS},
    "deepseek_v2": _LATENT | _ROUTED | {"topk_method": "group_limited_greedy", "n_shared_experts": 1},
    "deepseek_v3": _LATENT | _ROUTED | {"n_shared_experts": 1},
    "dots1": {"num_key_value_heads": 2, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "ernie4_5": {"use_bias": True},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "exaone4": {"layer_types": _TWO_KINDS},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    "flex_olmo": {},
    "gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": {
        "tie_word_embeddings": True, "final_logit_softcapping": 4.0, "attn_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 16, "layer_types": _TWO_KINDS,
    },
    "gemma3_text": {"tie_word_embeddings": True, "query_pre_attn_scalar": 16, "layer_types": _TWO_KINDS},
    "glm": {},
    "glm4": {},
    "glm4_moe": {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "use_qk_norm": True, "head_dim": 8},
    "gpt2": {"tie_word_embeddings": True},
    "gpt_bigcode": {"tie_word_embeddings": True},
    "gpt_neox": {"use_parallel_residual": True},
    "gpt_oss": {"num_local_experts": 4, "layer_types": _TWO_KINDS},
    "gptj": {"rotary_dim": 4},
    "granite": _SCALED | {"tie_word_embeddings": True},
    "granitemoe": _SCALED | {"num_local_experts": 4},
    "helium": {},
    "hunyuan_v1_dense": {},
    "jamba": {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama4_text": {
        "num_local_experts": 4, "intermediate_size_mlp": 64, "attention_chunk_size": 8, "no_rope_layer_interval": 2,
        "interleave_moe_layer_step": 2,
    },
    "mamba": {},
    "minimax_m2": {"num_local_experts": 4},
    "ministral": {"layer_types": _TWO_KINDS},
    "mistral": {},
    "mixtral": {"num_local_experts": 4},
    "mpt": {"tie_word_embeddings": True},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"layer_types": _TWO_KINDS},
    "olmoe": {},
    "opt": {"init_std": 0.1, "ffn_dim": 64, "word_embed_proj_dim": 32, "tie_word_embeddings": True},
    "phi": {},
    "phi3": {},
    "phimoe": {"num_local_experts": 4, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2_moe": {"shared_expert_intermediate_size": 32},
    "qwen3": {},
    "qwen3_5_moe_text": _LINEAR | {"shared_expert_intermediate_size": 32},
    "qwen3_5_text": _LINEAR,
    "qwen3_moe": {},
    "qwen3_next": _LINEAR | {"shared_expert_intermediate_size": 32},
    "seed_oss": {"attention_out_bias": True},
    "smollm3": {"tie_word_embeddings": True, "no_rope_layers": [1, 0, 1, 1]},
    "stablelm": {"use_qkv_bias": True},
    "starcoder2": {"use_bias": True},
}  # fmt: skip
"""Model type -> what its config needs beside the sizes above."""


def tiny_architecture(name: str, *, lora: bool = False) -> Any:
    """A random float32 model of four blocks; with `lora`, an adapter on every linear layer of it."""
    from transformers import AutoModelForCausalLM

    from rayswift.config.job import AdapterSpec
    from rayswift.models.adapters import add_lora

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32)
    model.config.use_cache = False
    with torch.no_grad():
        _disturb(model)
    if not lora:
        return model
    adapted = add_lora(model, AdapterSpec(rank=4), seed=0)
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:  # starts as zero, which would leave half of the adapter without gradients
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def tiny_config(name: str) -> Any:
    """The config of an architecture, its dropout off."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[name]
    known = {field.name for field in dataclasses.fields(cls)} | cls.attribute_map.keys()
    given = {key: value for key, value in _SIZES.items() if key in known} | ARCHITECTURES[name]
    config = cls(**{key: value for key, value in given.items() if value is not None})
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def _disturb(model: torch.nn.Module) -> None:
    """Move what is the same number everywhere away from it: fresh norms, biases, sinks, corrections of a router."""
    corrections = [buffer for name, buffer in model.named_buffers() if "bias" in name and buffer.is_floating_point()]
    for tensor in (*model.parameters(), *corrections):
        if tensor.numel() > 1 and float(tensor.max() - tensor.min()) < 1e-6:
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
