"""From a decoded medium to what the model reads: its features, and the text that its placeholder becomes.

The model's OWN processor decides both, so that placeholders and features cannot disagree. It is given, as are the
positions that some models compute from the grids of their images; neither is loaded here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np

from rayswift.config.job import MediaSpec
from rayswift.data.formats import RowError, one_row
from rayswift.data.media import KINDS, MARKS
from rayswift.data.media.decoding import Clip, decode_audio, decode_image, decode_video
from rayswift.data.media.features import laid_together
from rayswift.data.media.reading import read
from rayswift.data.rendering import Rendered, Segment
from rayswift.data.types import NUM_PLACEHOLDERS, Encoded, Example, Features, MediaKind, Medium, Message, Sample

Positions = Callable[[np.ndarray, Sequence[Features]], np.ndarray]
"""(ids [T], features of the document's media in order) -> rope positions [A, T], A axes."""
_TEXT_KEYS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets",
              "video_metadata", "num_patches"}  # fmt: skip


@dataclass(frozen=True)
class MediaEncoder:
    """A model's processor (transformers' ProcessorMixin) with what it needs to know about the model.

    `positions`: None for a model of plain positions.
    """

    processor: Any
    tokens: Mapping[MediaKind, str]
    """The placeholder that the chat template writes for a medium of each kind that the model takes."""
    placeholders: Mapping[str, int]
    """The tokens that features fill, and their ids: `tokens`, or others that these become (InternVL's video)."""
    spec: MediaSpec
    positions: Positions | None = None

    @cached_property
    def num_axes(self) -> int:
        """Of the model's rope positions; 0 for a model of plain ones."""
        return 0 if self.positions is None else len(self.positions(np.zeros(1, np.int64), ()))

    def encode(self, sample: Sample, data_file: str) -> tuple[Encoded, ...]:
        """The media of a Sample, read and encoded in order. Raises RowError for one that cannot be."""
        found: list[Encoded] = []
        for medium in sample.media:
            with one_row():
                found.append(self.encode_one(medium.kind, read(medium, data_file, self.spec)))
        return tuple(found)

    def encode_one(self, kind: MediaKind, content: bytes) -> Encoded:
        """A file of a kind, encoded. A model without video reads its frames as images."""
        return self.encoded(kind, self.decoded(kind, content))

    def decoded(self, kind: MediaKind, content: bytes) -> Any:
        """The image, samples or clip in a file of a kind. Leaves the processor alone: others may use it meanwhile."""
        if self._taken_as(kind) not in self.tokens:
            raise RowError(f"has {'a video' if kind == 'video' else f'an {kind}'}, which the model does not take")
        if kind == "image":
            return decode_image(content, self.spec)
        if kind == "audio":
            return decode_audio(content, int(self.processor.feature_extractor.sampling_rate), self.spec)
        return decode_video(content, self.spec)

    def encoded(self, kind: MediaKind, medium: Any) -> Encoded:
        """What was decoded, as the model reads it."""
        if kind == "image":
            return self._image(medium)
        if kind == "audio":
            return self.audio(medium)
        if self._taken_as(kind) == "image":
            return _joined([self._image(frame) for frame in medium])
        return self._clip(medium)

    def audio(self, samples: np.ndarray) -> Encoded:
        """Mono samples at the processor's rate, encoded. Raises RowError for more than the model hears at once."""
        extractor = self.processor.feature_extractor
        rate, longest = int(extractor.sampling_rate), int(getattr(extractor, "n_samples", 0))
        if longest and len(samples) > longest:
            raise RowError(
                f"has audio of {len(samples) / rate:.1f} s, and the model hears {longest / rate:g} s at once"
            )
        found = self._processed("audio", audio=[samples], sampling_rate=rate)
        if not num_placeholders(found.features):  # the model would look for features and refuse the batch
            raise RowError(f"has audio of {len(samples) / rate:.3f} s, of which the model's processor leaves nothing")
        return found

    def _image(self, image: Any) -> Encoded:
        return self._processed("image", images=[image])

    def _clip(self, clip: Clip) -> Encoded:
        return self._processed("video", videos=[clip], fps=clip.fps)

    def _processed(self, kind: MediaKind, **media: Any) -> Encoded:
        """What the processor makes of one medium; the text is taken from where it hands it to the tokenizer."""
        with self.processor.heard() as texts:
            found = self.processor(text=[self.tokens[kind]], return_tensors="pt", **media)
        features = {name: _array(value) for name, value in found.items() if name not in _TEXT_KEYS}
        kept = {name: value for name, value in features.items() if value is not None}
        return Encoded(texts[-1], kept | {NUM_PLACEHOLDERS: np.array([self._count(texts[-1])])})

    def _count(self, text: str) -> int:
        return sum(text.count(token) for token in self.placeholders)

    def filled(self, texts: Sequence[Rendered], sample: Sample, encoded: Sequence[Encoded]) -> list[Rendered]:
        """The training texts of a Sample with each placeholder become the text of its medium.

        A text that is only the beginning of the conversation has the first of the media. Raises RowError where the
        chat template lost one, or the row's own text has a placeholder.
        """
        found = [self._filled(text, sample, encoded) for text in texts]
        for text in found:
            if len(text.media) != text.num_media:
                raise RowError(f"has {text.num_media} media, of which the chat template renders {len(text.media)}")
        return found

    def prompt(self, text: str, media: Sequence[Medium], encoded: Sequence[Encoded]) -> Example:
        """A rendered conversation that is to be continued: its ids are those that training has before an answer.

        Raises RowError as `filled` does.
        """
        sample = Sample((Message("user", "", media=tuple(media)),))
        (found,) = self.filled([Rendered((Segment(text, 0),), num_media=len(media))], sample, encoded)
        # verbose=False: a prompt that is too long is refused by name later, not warned about in a log
        ids = list(self.processor.tokenizer(found.text, add_special_tokens=False, verbose=False)["input_ids"])
        return self.positioned(Example(ids, [0] * len(ids), tuple(one.features for one in found.media)))

    def _filled(self, text: Rendered, sample: Sample, encoded: Sequence[Encoded]) -> Rendered:
        left = {kind: iter([one for medium, one in zip(sample.media, encoded, strict=True)
                            if self._taken_as(medium.kind) == kind]) for kind in self.tokens}  # fmt: skip
        used: list[Encoded] = []

        def become(found: re.Match[str]) -> str:
            one = next(left[cast(MediaKind, found.lastgroup)], None)
            if one is None:
                raise RowError(f"has {found[0]}, which stands for a medium, in its text")
            used.append(one)
            return one.text

        segments = [replace(segment, text=self._pattern.sub(become, segment.text)) for segment in text.segments]
        if any(a.text != b.text and b.factors is not None for a, b in zip(segments, text.segments, strict=True)):
            raise RowError("has media in an answer whose parts data.loss weighs")
        return replace(text, segments=tuple(segments), media=tuple(used))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """A placeholder, or the mark of a medium under a chat template that knows no parts."""
        marks = {kind: "".join(MARKS[one] for one in KINDS if self._taken_as(one) == kind) for kind in self.tokens}
        either = (f"(?P<{kind}>{re.escape(token)}|[{marks[kind]}])" for kind, token in self.tokens.items())
        return re.compile("|".join(either))

    def unweighted(self, input_ids: Sequence[int], weights: Sequence[float]) -> list[float]:
        """The weights with 0 at every placeholder: nobody is asked to predict a picture."""
        ids = set(self.placeholders.values())
        return [0 if token in ids else weight for token, weight in zip(input_ids, weights, strict=True)]

    def kept(self, whole: Example, window: slice) -> tuple[Features, ...]:
        """The media whose placeholders all lie in a window of the document. Raises RowError for one that is cut."""
        places = np.flatnonzero(np.isin(whole.input_ids, list(self.placeholders.values())))
        kept: list[Features] = []
        first = 0
        for features in whole.media:
            own = places[first : first + num_placeholders(features)]
            first += len(own)
            inside = int(((own >= window.start) & (own < window.stop)).sum())
            if 0 < inside < len(own):
                raise RowError(
                    f"has {len(whole.input_ids)} tokens, and data.max_length={window.stop - window.start} would cut "
                    "through an image, audio or video: raise it, or lower the size of the media"
                )
            if inside:
                kept.append(features)
        return tuple(kept)

    def positioned(self, example: Example) -> Example:
        """The Example with rope positions, where the model has its own.

        Raises RowError for placeholders that no medium fills, such as a text writes: the model would refuse the batch.
        """
        places = int(np.isin(example.input_ids, list(self.placeholders.values())).sum())
        filled = sum(num_placeholders(features) for features in example.media)
        if places != filled:
            raise RowError(f"has {places} tokens that stand for media ({', '.join(self.placeholders)}), and media for "
                           f"{filled} of them: its text must not have such tokens")  # fmt: skip
        if self.positions is None:
            return example
        with one_row():
            return replace(example, rope_AT=self.positions(np.asarray(example.input_ids), example.media))

    def _taken_as(self, kind: MediaKind) -> MediaKind:
        return "image" if kind == "video" and "video" not in self.tokens else kind

    @staticmethod
    def placeholder_medium(kind: MediaKind) -> Medium:
        """A medium whose content is nowhere, to be encoded by `filler`."""
        return Medium(kind, b"")

    def filler(self, kind: MediaKind) -> Encoded:
        """The smallest medium of a kind: a white picture, a still video, silence."""
        from PIL import Image

        picture = Image.new("RGB", (32, 32), "white")
        if kind == "audio":
            return self.audio(np.zeros(int(self.processor.feature_extractor.sampling_rate) // 2, np.float32))
        return self._image(picture) if self._taken_as(kind) == "image" else self._clip(Clip([picture] * 2, [0, 1], 2.0))


def num_placeholders(features: Features) -> int:
    """Tokens of the model's input that the features of a medium fill."""
    return int(features[NUM_PLACEHOLDERS][0])


def _joined(parts: Sequence[Encoded]) -> Encoded:
    names = parts[0].features
    features = {name: laid_together([part.features[name] for part in parts]) for name in names}
    features[NUM_PLACEHOLDERS] = features[NUM_PLACEHOLDERS].sum(keepdims=True)
    return Encoded("".join(part.text for part in parts), features)


def _array(value: Any) -> np.ndarray | None:
    """A feature as an array whose first axis counts items; None for what is no array."""
    if isinstance(value, list | tuple) and value and all(isinstance(one, int | float) for one in value):
        value = np.asarray(value)
    if hasattr(value, "numpy"):
        value = value.numpy()
    if not isinstance(value, np.ndarray) or not value.ndim:
        return None
    return np.ascontiguousarray(value)  # safetensors writes other numbers for any other layout, and says nothing
