"""A prompt with an image or a sound, made here: what a model is shown to prove that its towers came along.

Noise, and not a white picture: a tower that was lost, or a processor that scales otherwise, changes what is computed.
"""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path

import numpy as np

from rayswift.config.job import MediaSpec
from rayswift.data.formats import RowError
from rayswift.data.media import MARKS
from rayswift.data.media.encoder import MediaEncoder
from rayswift.data.templates import chat_text
from rayswift.data.types import Encoded, Example, MediaKind
from rayswift.errors import ConfigError, ExportError
from rayswift.models.processor import has_processor
from rayswift.training.media import load_encoder

_KINDS: tuple[MediaKind, ...] = ("image", "audio")
"""A video goes through the tower of images."""
_QUESTION = "What is this?"
_WIDTH, _HEIGHT, _SECONDS = 72, 56, 0.6


def encoder_of(folder: str | Path) -> MediaEncoder | None:
    """The encoder of a model folder; None for a model of text, and, with a warning, where it cannot be built here."""
    if not has_processor(str(folder)):
        return None
    try:
        return load_encoder(str(folder), MediaSpec())
    except ConfigError as error:
        print(f"warning: proved with text alone, since its processor cannot be loaded: {error}", file=sys.stderr)
        return None


def shown(encoder: MediaEncoder | None) -> dict[str, Example]:
    """A question about noise, as it is trained and served, for each kind of media that the model takes.

    Raises ExportError where its own processor or chat template cannot make one.
    """
    if encoder is None:
        return {}
    try:
        return {kind: _asked(encoder, kind) for kind in _KINDS if kind in encoder.tokens}
    except RowError as error:
        raise ExportError(f"cannot be shown a medium: {error}", path="processor", fix="mend its processor") from error


def same_shown(one: dict[str, Example], other: dict[str, Example]) -> bool:
    """Whether two processors made the same of it: ids, features and positions."""
    return one.keys() == other.keys() and all(_equal(one[kind], other[kind]) for kind in one)


def _asked(encoder: MediaEncoder, kind: MediaKind) -> Example:
    tokenizer, medium = encoder.processor.tokenizer, encoder.placeholder_medium(kind)
    text = f"{MARKS[kind]}{_QUESTION}"
    if tokenizer.chat_template:
        text = chat_text(tokenizer, [{"role": "user", "content": text}], generation_prompt=True)
    return encoder.prompt(text, [medium], [_encoded(encoder, kind)])


def _encoded(encoder: MediaEncoder, kind: MediaKind) -> Encoded:
    noise = np.random.default_rng(0)
    if kind == "audio":
        samples = noise.normal(scale=0.1, size=int(_SECONDS * encoder.processor.feature_extractor.sampling_rate))
        return encoder.audio(samples.astype(np.float32))
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(noise.integers(0, 256, (_HEIGHT, _WIDTH, 3), dtype=np.uint8)).save(buffer, "PNG")
    return encoder.encode_one(kind, buffer.getvalue())


def _equal(one: Example, other: Example) -> bool:
    pairs = zip(one.media, other.media, strict=True)
    return (
        one.input_ids == other.input_ids
        and all(a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a) for a, b in pairs)
        and (one.rope_AT is None) == (other.rope_AT is None)
        and (one.rope_AT is None or np.array_equal(one.rope_AT, np.asarray(other.rope_AT)))
    )
