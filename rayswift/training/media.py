"""The media encoder of a job's model, loaded once per process: its processor, placeholders and positions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from rayswift.config.job import MediaSpec, ModelSpec
from rayswift.data.collate import Filler, PackedSequence
from rayswift.data.media import KINDS, MARKS
from rayswift.data.media.encoder import MediaEncoder
from rayswift.data.media.parts import taken_kinds
from rayswift.data.stream import StreamSettings
from rayswift.data.tokenize import encode
from rayswift.data.types import MediaKind, Message, Sample
from rayswift.errors import ConfigError

_PARTS: dict[MediaKind, str] = {"image": "image_processor", "audio": "feature_extractor", "video": "video_processor"}


def media_encoder(model_path: str, settings: StreamSettings) -> MediaEncoder | None:
    """The encoder of the model for a stream whose rows have media; None for a stream of text.

    Raises ConfigError for a model that takes no medium of these kinds.
    """
    if not settings.media_kinds:
        return None
    encoder = _encoder(model_path, settings.media)
    for kind in settings.media_kinds:
        if kind not in encoder.tokens and not (kind == "video" and "image" in encoder.tokens):
            raise ConfigError(
                f"takes no {kind}, which the rows have", path="model.path", value=model_path,
                fix=f"use a model that takes {' and '.join(settings.media_kinds)}",
            )  # fmt: skip
    return encoder


def load_encoder(model_path: str, spec: MediaSpec) -> MediaEncoder:
    """The encoder of a model that takes more than text. Raises ConfigError when its processor cannot be built."""
    import torch

    from rayswift.models.loading import load_config, shape_model
    from rayswift.models.positions import positions_of
    from rayswift.models.processor import load_processor

    processor = load_processor(model_path)
    config = load_config(model_path)
    ids = {kind: found for kind in KINDS if (found := _token_id(config, kind)) is not None}
    tokens = {
        kind: token
        for kind in taken_kinds(processor.tokenizer)
        if getattr(processor, _PARTS[kind], None) is not None
        and isinstance(token := getattr(processor, f"{kind}_token", None), str)
    }
    placeholders = {str(processor.tokenizer.convert_ids_to_tokens(found)): found for found in ids.values()}
    shape = shape_model(ModelSpec(path=model_path), dtype=torch.float32)
    return MediaEncoder(processor, tokens, placeholders, spec, positions_of(shape, ids))


_encoder = cache(load_encoder)


def _token_id(config: Any, kind: MediaKind) -> int | None:
    """The id whose embeddings the model replaces by features of a kind."""
    names = (f"{kind}_token_id", f"{kind}_token_index")
    return next((int(found) for name in names if (found := getattr(config, name, None)) is not None), None)


def media_filler(encoder: MediaEncoder | None, kinds: Sequence[MediaKind]) -> Filler | None:
    """What a batch gets that lacks a kind of media; None for a stream of text."""
    if encoder is None:
        return None
    return Filler({kind: _document(encoder, kind) for kind in kinds})


def _document(encoder: MediaEncoder, kind: MediaKind) -> PackedSequence:
    """A question with the smallest medium of a kind, in which nothing is trained."""
    encoded = encoder.filler(kind)
    medium = Message("user", MARKS[kind], media=(encoder.placeholder_medium(kind),))
    sample = Sample((medium, Message("assistant", ".")))
    (found,) = encode(
        [sample], encoder.processor.tokenizer, max_length=1 << 20, rendering="chat", media=encoder, encoded=[(encoded,)]
    )
    if not isinstance(found, list):
        raise ConfigError(f"cannot show its model a {kind}: {found}", path="model.path", fix="mend its chat template")
    example = found[0]
    ids = np.asarray(example.input_ids, np.int32)
    return PackedSequence(ids, np.zeros(len(ids), np.float32), [len(ids)], list(example.media), example.rope_AT)
