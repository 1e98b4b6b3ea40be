"""Makes a small vision-language model from nothing: a CLIP tower, a projector and a Qwen3 in LLaVA's arrangement.

The folder is an ordinary one of transformers' LLaVA, with processor files and a chat template that takes images.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayswift.models.hub_names import write_hub_names
from rayswift.models.init import InitReport, check_free, generation_config, random_model
from rayswift.models.quiet import quiet_progress
from rayswift.models.staging import staged_folder
from rayswift.models.tokenizer import PAD, train_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

IMAGE = "<image>"
CHAT_TEMPLATE = """\
{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}{{- message['content'] }}{%- else %}{%- for part in message['content'] %}
{%- if part['type'] in ('image', 'image_url') %}{{- '<image>' }}{%- else %}{{- part['text'] }}{%- endif %}
{%- endfor %}{%- endif %}{{- '<|im_end|>' + '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


@dataclass(frozen=True)
class VisionSizes:
    """Sizes of a model that two cores train in minutes. An image is `(image_size / patch_size)²` tokens."""

    image_size: int = 32
    patch_size: int = 8
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    vocab_size: int = 512
    max_length: int = 1024


def init_vision_model(
    directory: str | os.PathLike[str],
    *,
    train_tokenizer_files: Sequence[str | os.PathLike[str]],
    sizes: VisionSizes = VisionSizes(),  # frozen
    seed: int = 0,
) -> InitReport:
    """A report on the folder that was made: the same weights for the same arguments.

    Raises ConfigError for a folder that is not empty and for files no tokenizer can be trained on.
    """
    check_free(directory)
    tokenizer = train_tokenizer(train_tokenizer_files, vocab_size=sizes.vocab_size - 1, max_length=sizes.max_length)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    config = _config(sizes, tokenizer)
    model = random_model(config, seed=seed)
    model.generation_config = generation_config(tokenizer)
    with staged_folder(directory) as stage, quiet_progress():
        model.save_pretrained(stage)
        write_hub_names(stage)
        tokenizer.save_pretrained(stage)
        for name, settings in _processor_files(sizes).items():
            (stage / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    num_params = sum(parameter.numel() for parameter in model.parameters())
    return InitReport(str(directory), "llava", num_params, sizes.vocab_size, len(tokenizer))


def _config(sizes: VisionSizes, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    from transformers import CLIPVisionConfig, LlavaConfig, Qwen3Config

    hidden, image = sizes.hidden_size, int(str(tokenizer.convert_tokens_to_ids(IMAGE)))
    blocks: dict[str, Any] = {
        "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
    }  # fmt: skip
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    ends["pad_token_id"] = tokenizer.convert_tokens_to_ids(PAD)
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            **blocks, image_size=sizes.image_size, patch_size=sizes.patch_size, projection_dim=hidden
        ),
        text_config=Qwen3Config(
            **blocks, **ends, vocab_size=sizes.vocab_size, num_key_value_heads=sizes.heads // 2,
            head_dim=hidden // sizes.heads, max_position_embeddings=sizes.max_length,
        ),
        image_token_index=image, vision_feature_layer=-1, **ends,
    )  # fmt: skip


def _processor_files(sizes: VisionSizes) -> dict[str, dict[str, Any]]:
    """What tells any reader how a picture becomes numbers, and how many tokens it is."""
    size = {"height": sizes.image_size, "width": sizes.image_size}
    image = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": sizes.image_size},
        "do_center_crop": True, "crop_size": size, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "processor_class": "LlavaProcessor",
    }  # fmt: skip
    processor = {
        "processor_class": "LlavaProcessor", "patch_size": sizes.patch_size, "image_token": IMAGE,
        "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
    }  # fmt: skip
    return {"preprocessor_config.json": image, "processor_config.json": processor}
