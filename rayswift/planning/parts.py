"""The parts of a model that takes more than text, by the names of its weights: towers, projector, language model."""

from __future__ import annotations

from rayswift.config.job import Part

PARTS: tuple[Part, ...] = ("vision", "audio", "projector", "language")
# transformers' names for the modules, looked for in this order: a projector may lie inside a tower (Qwen-VL's merger).
_NAMES: tuple[tuple[Part, frozenset[str]], ...] = (
    ("projector", frozenset({
        "multi_modal_projector", "mm_projector", "multimodal_projector", "connector", "merger", "merger_list",
        "deepstack_merger_list", "embed_vision", "embed_audio", "modality_projection", "audio_projector",
        "vision_projector", "aligner", "adapter",
    })),
    ("vision", frozenset({
        "vision_tower", "vision_model", "visual", "vision_encoder", "vision_embed_tokens", "vision_backbone", "vit",
        "image_encoder", "image_tower",
    })),
    ("audio", frozenset({"audio_tower", "audio_model", "audio_encoder", "speech_encoder", "encoder_audio"})),
)  # fmt: skip


def module_of(name: str) -> str:
    """The segment of a dotted name that puts it into a part other than the language model's: `visual`, ..."""
    segments = name.split(".")
    return next(one for _, names in _NAMES for one in segments if one in names)


def part_of(name: str) -> Part:
    """The part that a weight or module of this dotted name belongs to."""
    segments = set(name.split("."))
    return next((part for part, names in _NAMES if segments & names), "language")
