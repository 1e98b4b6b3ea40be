"""Tiny folders of the multimodal families, made from config: weights, trained tokenizer, template, processor files.

Each folder is what the hub has for that family, some thousand times smaller: a new family is one function here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import AutoModelForMultimodalLM, PreTrainedTokenizerFast

from rayswift.models.hub_names import write_hub_names
from rayswift.models.processor import _pillow_class
from rayswift.models.tokenizer import train_tokenizer

TEXT = {
    "vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": 2,
}  # fmt: skip
_WORDS = "What is in the picture? Who are they? A digit. zero one two three four five six seven eight nine\n" * 20
_TEMPLATE = """\
{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}{{- message['content'] }}{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'text' %}{{- part['text'] }}{%- elif part['type'] == 'image' %}{{- IMAGE }}
{%- elif part['type'] == 'video' %}{{- VIDEO }}{%- elif part['type'] == 'audio' %}{{- AUDIO }}{%- endif %}
{%- endfor %}{%- endif %}{{- '<|im_end|>' + '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
_QWEN_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def make(family: str, folder: Path, *, seed: int = 0) -> Path:
    """The folder of a random model of `family`, a key of FAMILIES."""
    FAMILIES[family](folder, seed)
    return folder


def make_for_vllm(family: str, folder: Path) -> Path:
    """The same with heads of 32 numbers, for which vLLM's attention on a CPU has a kernel."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("num_attention_heads", "num_key_value_heads"):
            patch.setitem(TEXT, name, 1)
        patch.setitem(_QWEN_ROPE, "mrope_section", [4, 6, 6])
        return make(family, folder)


def tokenizer_with(
    folder: Path, special: list[str], *, image: str = "''", video: str = "''", audio: str = "''", **named: str
) -> PreTrainedTokenizerFast:
    folder.mkdir(parents=True, exist_ok=True)
    words = folder / "words.txt"
    words.write_text(_WORDS)
    tokenizer = train_tokenizer([words], vocab_size=400, max_length=2048)
    words.unlink()
    tokenizer.add_special_tokens({"additional_special_tokens": special}, replace_extra_special_tokens=False)
    template = _TEMPLATE.replace("IMAGE", image).replace("VIDEO", video).replace("AUDIO", audio)
    tokenizer.chat_template = template
    if named:  # as a hub folder has them in its tokenizer_config.json
        tokenizer._set_model_specific_special_tokens(named)
        tokenizer.init_kwargs["extra_special_tokens"] = named
    return tokenizer


def write_model(
    folder: Path, config: Any, tokenizer: PreTrainedTokenizerFast, seed: int, parts: dict[str, Any],
    processor: dict[str, Any], model_class: Any = AutoModelForMultimodalLM,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    model = model_class.from_config(config) if model_class is AutoModelForMultimodalLM else model_class(config)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for part in parts.values():
        part.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(processor))


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(token))


def _vision(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return sizes | more


def _llava(folder: Path, seed: int) -> None:
    tokenizer = tokenizer_with(folder, ["<image>"], image="'<image>\\n'")
    config = tf.LlavaConfig(
        text_config=tf.Qwen3Config(**TEXT, head_dim=TEXT["hidden_size"] // TEXT["num_attention_heads"]),
        vision_config=tf.CLIPVisionConfig(**_vision(image_size=32, patch_size=8, projection_dim=32)),
        image_token_index=token_id(tokenizer, "<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    image = tf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    write_model(folder, config, tokenizer, seed, {"image": image}, {
        "processor_class": "LlavaProcessor", "patch_size": 8, "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1, "image_token": "<image>",
    })  # fmt: skip
    write_hub_names(folder)


_QWEN_TOKENS = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
_QWEN_MEDIA = {
    "image": "'<|vision_start|><|image_pad|><|vision_end|>'",
    "video": "'<|vision_start|><|video_pad|><|vision_end|>'",
}


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {name: token_id(tokenizer, token) for name, token in zip(names, _QWEN_TOKENS, strict=True)}


def _qwen2_5_vl(folder: Path, seed: int) -> None:
    tokenizer = tokenizer_with(folder, _QWEN_TOKENS, **_QWEN_MEDIA)
    config = tf.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": _QWEN_ROPE},
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
                       "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 56,
                       "fullatt_block_indexes": [1]},
        **_qwen_ids(tokenizer),
    )  # fmt: skip
    image = tf.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
    write_model(folder, config, tokenizer, seed, {"image": image}, {"processor_class": "Qwen2_5_VLProcessor"})


def _qwen3_vl(folder: Path, seed: int) -> None:
    tokenizer = tokenizer_with(folder, _QWEN_TOKENS, image=_QWEN_MEDIA["image"], video=_QWEN_MEDIA["video"])
    config = tf.Qwen3VLConfig(
        text_config={**TEXT, "head_dim": TEXT["hidden_size"] // TEXT["num_attention_heads"],
                     "rope_parameters": {**_QWEN_ROPE, "mrope_interleaved": True}},
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
                       "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
                       "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        **_qwen_ids(tokenizer),
    )  # fmt: skip
    image = tf.Qwen2VLImageProcessorPil(
        patch_size=16, min_pixels=32 * 32, max_pixels=32 * 32 * 16, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    write_model(folder, config, tokenizer, seed, {"image": image}, {"processor_class": "Qwen3VLProcessor"})


_IDEFICS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
_IDEFICS += [f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)]


def _idefics_like(folder: Path, seed: int, prefix: str) -> None:
    video = {"video": "'<video>'"} if prefix == "SmolVLM" else {}
    tokenizer = tokenizer_with(folder, [*_IDEFICS, "<video>"], image="'<image>'", **video)
    config = getattr(tf, f"{prefix}Config")(
        text_config={"model_type": "llama", **TEXT}, vision_config=_vision(image_size=32, patch_size=8),
        scale_factor=2, image_token_id=token_id(tokenizer, "<image>"), pad_token_id=0,
    )  # fmt: skip
    image = _pillow_class(f"{prefix}ImageProcessorPil")(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True
    )
    processor = {"processor_class": f"{prefix}Processor", "image_seq_len": 4}
    write_model(folder, config, tokenizer, seed, {"image": image}, processor)


def _smolvlm(folder: Path, seed: int) -> None:
    _idefics_like(folder, seed, "SmolVLM")


def _idefics3(folder: Path, seed: int) -> None:
    _idefics_like(folder, seed, "Idefics3")


def _internvl(folder: Path, seed: int) -> None:
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
             "video_token": "<video>"}  # fmt: skip
    tokenizer = tokenizer_with(folder, list(named.values()), image="'<IMG_CONTEXT>\\n'", video="'<video>\\n'")
    tokenizer.init_kwargs["extra_special_tokens"] = named
    config = tf.InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config=_vision(image_size=[32, 32], patch_size=[8, 8]),
        image_token_id=token_id(tokenizer, "<IMG_CONTEXT>"), image_seq_length=4, downsample_ratio=0.5,
        vision_feature_layer=-1,
    )  # fmt: skip
    image = tf.GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": 4}
    write_model(folder, config, tokenizer, seed, {"image": image}, processor)
    _name_tokens(folder, named)


def _name_tokens(folder: Path, named: dict[str, str]) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"extra_special_tokens": named}))


_AUDIO_TOWER = {"num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64,
                "d_model": 32}  # fmt: skip


def _qwen2_audio(folder: Path, seed: int) -> None:
    special = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    tokenizer = tokenizer_with(folder, special, audio="'<|audio_bos|><|AUDIO|><|audio_eos|>'")
    config = tf.Qwen2AudioConfig(
        text_config={"model_type": "qwen2", **TEXT},
        audio_config={"model_type": "qwen2_audio_encoder", "max_source_positions": 400, **_AUDIO_TOWER},
        audio_token_index=token_id(tokenizer, "<|AUDIO|>"),
    )
    audio = tf.WhisperFeatureExtractor(feature_size=16, chunk_length=8, n_fft=400)
    write_model(folder, config, tokenizer, seed, {"audio": audio}, {"processor_class": "Qwen2AudioProcessor"})


_OMNI = {
    "image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
}  # fmt: skip


def _qwen2_5_omni(folder: Path, seed: int) -> None:
    tokenizer = tokenizer_with(
        folder, list(_OMNI.values()), image="'<|vision_bos|><|IMAGE|><|vision_eos|>'",
        video="'<|vision_bos|><|VIDEO|><|vision_eos|>'", audio="'<|audio_bos|><|AUDIO|><|audio_eos|>'",
    )  # fmt: skip
    ids = {name: token_id(tokenizer, token) for name, token in _OMNI.items()}
    config = tf.Qwen2_5OmniThinkerConfig(
        text_config={**TEXT, "rope_parameters": _QWEN_ROPE},
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
                       "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 56,
                       "fullatt_block_indexes": [1]},
        audio_config={**_AUDIO_TOWER, "n_window": 10, "output_dim": 32, "max_source_positions": 400},
        image_token_id=ids["image_token"], video_token_id=ids["video_token"], audio_token_id=ids["audio_token"],
        vision_start_token_id=ids["vision_bos_token"], vision_end_token_id=ids["vision_eos_token"],
        audio_start_token_id=ids["audio_bos_token"], audio_end_token_id=ids["audio_eos_token"],
    )  # fmt: skip
    parts = {
        "image": tf.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 16),
        "audio": tf.WhisperFeatureExtractor(feature_size=16, chunk_length=8, n_fft=400),
    }
    both = {**parts["image"].to_dict(), **parts["audio"].to_dict()}
    model_class = tf.Qwen2_5OmniThinkerForConditionalGeneration
    write_model(folder, config, tokenizer, seed, {}, {"processor_class": "Qwen2_5OmniProcessor"}, model_class)
    (folder / "preprocessor_config.json").write_text(json.dumps(both))  # the hub's folder has both in one file
    _name_tokens(folder, _OMNI)


FAMILIES: dict[str, Callable[[Path, int], None]] = {
    "llava": _llava, "qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl, "smolvlm": _smolvlm, "idefics3": _idefics3,
    "internvl": _internvl, "qwen2_audio": _qwen2_audio, "qwen2_5_omni": _qwen2_5_omni,
}  # fmt: skip
