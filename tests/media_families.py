"""A tiny model of each multimodal family with all that data needs of it, and plans over rows with media."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from rayswift.config.job import DataSource, DataSpec, MediaSpec, ModelSpec
from rayswift.data.blocks import packed_sequences
from rayswift.data.collate import PackedSequence, collate
from rayswift.data.dataset_info import expand
from rayswift.data.inspect import open_sources
from rayswift.data.media.encoder import MediaEncoder
from rayswift.data.prepare import prepare_chunk
from rayswift.data.stream import StreamPlan
from rayswift.models.loading import load_model, load_tokenizer
from rayswift.training.media import media_encoder
from tests.multimodal_models import FAMILIES, make

SPEC = MediaSpec(max_frames=4)
PLACEHOLDERS = {
    "llava": {"image": "<image>"}, "idefics3": {"image": "<image>"},
    "smolvlm": {"image": "<image>", "video": "<video>"},
    "internvl": {"image": "<IMG_CONTEXT>", "video": "<video>"},
    "qwen2_5_vl": {"image": "<|image_pad|>", "video": "<|video_pad|>"},
    "qwen3_vl": {"image": "<|image_pad|>", "video": "<|video_pad|>"},
    "qwen2_audio": {"audio": "<|AUDIO|>"},
    "qwen2_5_omni": {"image": "<|IMAGE|>", "audio": "<|AUDIO|>", "video": "<|VIDEO|>"},
}  # fmt: skip
"""What the chat template of each family writes for a medium."""
TAKES = {name: tuple(kinds) if "audio" in kinds else ("image", "video") for name, kinds in PLACEHOLDERS.items()}
PAIRS = [(name, kind) for name in FAMILIES for kind in TAKES[name]]
"""Every family with every kind that its rows may have; who knows no video reads its frames."""


@dataclass(frozen=True)
class Family:
    """A model's folder and what is loaded from it."""

    name: str
    folder: Path

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(str(self.folder))

    @cached_property
    def model(self) -> Any:
        return load_model(ModelSpec(path=str(self.folder)), dtype=torch.float32).eval()

    def encoder(self, plan: StreamPlan) -> MediaEncoder | None:
        return media_encoder(str(self.folder), plan.settings)

    def encoder_ids(self) -> set[int]:
        """The ids whose embeddings the model replaces, by the names that its configuration has for them."""
        names = [f"{kind}_token_{what}" for kind in ("image", "audio", "video") for what in ("id", "index")]
        return {value for name in names if (value := getattr(self.model.config, name, None)) is not None}

    def table(self, plan: StreamPlan) -> Any:
        return prepare_chunk(plan, 0, self.tokenizer, self.encoder(plan))

    def sequences(self, plan: StreamPlan) -> list[PackedSequence]:
        """The sequences of a plan none of whose rows is bad."""
        table = self.table(plan)
        assert not [bad for one in table["bad"].to_pylist() for bad in one]
        return packed_sequences(table)

    def alone(self, sequence: PackedSequence) -> torch.Tensor:
        """Log-probabilities [T] of a document's next tokens, with the positions that transformers' model computes."""
        one = collate([sequence], 0, 1)
        ids = one.input_ids_BT
        more = dict(one.media)
        if self.name in ("qwen2_5_vl", "qwen3_vl"):
            config = self.model.config
            kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
            more["mm_token_type_ids"] = kinds.int()
        with torch.no_grad():
            logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids).bool(), **more).logits
        return torch.log_softmax(logits.float(), -1).gather(-1, one.targets_BT[..., None])[0, :, 0]


_MADE: dict[str, Family] = {}


def family(name: str, folders: pytest.TempPathFactory) -> Family:
    """The family of that name, made once per session."""
    if name not in _MADE:
        _MADE[name] = Family(name, make(name, folders.mktemp("family") / name))
    return _MADE[name]


def media_plan(path: Path, dataset: str | None = None, **data: Any) -> StreamPlan:
    """The stream over a file of rows, or a dataset of a `dataset_info.json`, planned as a job would."""
    source = DataSource(path=str(path), dataset=dataset)
    sources = (source if dataset is None else expand(source, place="data.train.0"),)
    spec = DataSpec(train=sources, **({"max_length": 2048, "media": SPEC} | data))
    return open_sources(sources, kinds=spec.media.kinds).stream(spec, "chat")
