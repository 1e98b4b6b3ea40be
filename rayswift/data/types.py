"""The nouns of the data path: Sample -> Example -> PackedBatch. No torch import, no Ray.

Shape legend: B sequences in a micro-batch, T tokens in a sequence.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import numpy as np
    import torch


MediaKind = Literal["image", "audio", "video"]


@dataclass(frozen=True)
class Medium:
    """An image, a sound or a video: the path, URL or data URI of a file, or its bytes."""

    kind: MediaKind
    source: str | bytes


NUM_PLACEHOLDERS = "num_placeholders"
"""Kept among the features, and no argument of the model: how many tokens of its input they fill."""
Features = dict[str, np.ndarray]
"""What a model reads of a medium, by the name of its forward's argument; the first axis counts items or patches."""


@dataclass(frozen=True)
class Encoded:
    """A medium as the model reads it: the text in place of its placeholder, and its features."""

    text: str
    features: Features


@dataclass(frozen=True)
class Message:
    """One turn. `loss` is what each of its tokens counts in the loss, 0 for nothing; None leaves it to the role.

    `reasoning_content` is what an assistant thought before `content`. `media` are in the order of their marks in
    `content`, kind by kind (`rayswift.data.media`).
    """

    role: str
    content: str
    loss: float | None = None
    reasoning_content: str = ""
    media: tuple[Medium, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A row in one shape for all formats: a conversation (`messages`) or plain `text`; never both, never neither.

    `rejected` is the conversation with another, worse last answer; `label` says of the last answer alone whether it is
    one to give (KTO), None where nobody judged it.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    rejected: tuple[Message, ...] = ()
    label: bool | None = None

    def __post_init__(self) -> None:
        assert bool(self.messages) != (self.text is not None), "a Sample is a conversation or a text"

    @property
    def media(self) -> tuple[Medium, ...]:
        """All media of the conversation, turn by turn."""
        return tuple(medium for message in self.messages for medium in message.media)


@dataclass(frozen=True)
class Example:
    """A tokenized row. `loss_mask[t] >= 0` is what predicting `input_ids[t]` counts; both have the same length."""

    input_ids: list[int]
    loss_mask: list[float]
    """Numbers: 0, 1, or the weight that a row gives a message."""
    media: tuple[Features, ...] = ()
    """The features that fill its placeholders, in order."""
    rope_AT: np.ndarray | None = None
    """Rope positions on each axis of a model that has several; None for plain positions."""
    cut: bool = False
    """Whether tokens of the row were thrown away because it was too long."""

    def __post_init__(self) -> None:
        assert len(self.input_ids) == len(self.loss_mask), "one mask value per token"


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be trained on, and why. Becomes one line of quarantine.jsonl. `sha256` is its file's.

    `counts` is false for a row that is well made and of no use to the method: it is no fault of the data.
    """

    file: str
    row: int
    line: int | None
    reason: str
    content: str = ""
    sha256: str = ""
    counts: bool = True

    @property
    def identity(self) -> tuple[str, str, int]:
        """The same for the same row of the same file wherever its folder lies: a submitted job gets a new one."""
        return self.file.rpartition("/")[2], self.sha256, self.row

    def to_json(self) -> str:
        """One JSON object on one line."""
        return json.dumps(self.__dict__, ensure_ascii=False)


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch. Invariant: a position never sees, and is never asked to predict, another document's token.

    `input_ids_BT`, `position_ids_BT`, `targets_BT` are int64, `weights_BT` is float32. `position_ids_BT` restarts at 0
    with every document, padding included. `targets_BT[b, t]` is the next token of the same document and
    `weights_BT[b, t]` what predicting it counts; the weight is 0 on a document's last token and on padding.
    """

    input_ids_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    targets_BT: torch.Tensor
    weights_BT: torch.Tensor
    rope_ABT: torch.Tensor | None = None
    """Rope positions on each of several axes, int64; None where the model has plain positions."""
    media: dict[str, torch.Tensor] = field(default_factory=dict)
    """Features of all media, row by row, by the name of the model's argument."""

    def positions(self) -> torch.Tensor:
        """What a model takes: [B, T], or with rope axes [1 + A, B, T], of which the first tells documents apart."""
        import torch

        plain = self.position_ids_BT
        return plain if self.rope_ABT is None else torch.cat([plain[None], self.rope_ABT])


@dataclass(frozen=True)
class StepInput:
    """One rank's share of one optimizer step. Empty once the rank's stream is exhausted.

    `num_micro_batches` is the same on every rank; `num_tokens` excludes padding; `next_chunk`, `next_sequence` is the
    stream position after the last sequence of this share, None when the share is not full (the stream has ended).
    """

    micro_batches: tuple[PackedBatch, ...]
    num_sequences: int
    num_tokens: int
    num_rows: int
    num_rows_visited: int
    position: tuple[int, int] | None
    bad_rows: tuple[BadRow, ...] = field(default=())
    rows: np.ndarray | None = field(default=None, compare=False, repr=False)
    """What became of each row, for the record of the run (`rayswift.data.row_keys.ROWS_DTYPE`)."""
    layout: tuple[int, str] | None = field(default=None, compare=False, repr=False)
    """The last chunk that begins in this share, and its layout as JSON, for the checkpoint (see `chunk_layout`)."""
