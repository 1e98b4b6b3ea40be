"""What was measured and proved of an export: differences, rows, speeds, answers of a serving engine.

Knows figures and their bounds as plain records of the manifest; measures nothing.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Base of everything the manifest holds: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Difference(Record):
    """Absolute differences of log-probabilities over all prompt positions and the whole vocabulary, and bounds."""

    max_abs: float
    mean_abs: float
    bound_max_abs: float | None
    """None for a quantized model: one token in thousands may move far without harm."""
    bound_mean_abs: float

    @property
    def within(self) -> bool:
        """Whether both figures are numbers within their bounds."""
        bound = math.inf if self.bound_max_abs is None else self.bound_max_abs
        return self.max_abs <= bound and self.mean_abs <= self.bound_mean_abs


class RowsUsed(Record):
    """Rows that an export was calibrated or judged on."""

    files: dict[str, str]
    """The sha256 of each file that they were read from."""
    num_rows: int
    num_tokens: int
    sha256: str
    """Of their token ids."""


class HeldOut(Record):
    """What rounding or quantizing cost on rows: loss per trained token before and after, and the ratio of perplexities.

    Before is the trained model in float32, its adapter merged; after are the written files, computed with in float32.
    """

    rows: RowsUsed
    trained_on: bool = False
    """Whether they are of a file that is among the training data: the job holds none out, or that file was named.
    Which rows of it a run came to see, its record alone knows (`rayswift data audit`)."""
    reference_loss: float
    loss: float
    perplexity_ratio: float
    bound_perplexity_ratio: float
    top1_agreement: float
    """The fraction of trained tokens whose place has the same most likely token."""
    bound_top1_agreement: float

    @property
    def told(self) -> str:
        """`16 held-out rows`, or `5 rows of the training data`."""
        return f"{self.rows.num_rows} {'rows of the training data' if self.trained_on else 'held-out rows'}"


class Quantization(Record):
    """How the weights were quantized. `ignore` has the patterns of the linear layers that were not."""

    quantizer: str
    settings: dict[str, Any]
    num_layers: int
    ignore: tuple[str, ...]
    fraction: float
    """Of the weights in the language model's blocks that were quantized."""
    bytes_before: int
    """Size of the weights before, in the dtype of the export."""
    calibration: RowsUsed | None = None
    """Null for a quantizer that needs no rows."""
    versions: dict[str, str]


class Served(Record):
    """What a serving engine said from the written folder, beside transformers reading the same folder in float32."""

    engine: str
    version: str
    num_positions: int
    mean_abs: float
    """Of the differences of log-probabilities of the prompts' own tokens."""
    max_abs: float
    bound_mean_abs: float
    greedy_agreement: float
    """The fraction of greedy tokens before the first that differs from the unquantized model's."""
    greedy_regret: float | None = None
    """How much less likely its greedy tokens are than transformers' likeliest, on average of log-probabilities."""
    template_equal: bool
    """Whether the server makes the ids of a chat that training made."""
    media_equal: bool = True
    """As `template_equal`, of the questions about media among the prompts; true for a model of text."""
    load_s: float
    first_token_s: float | None = None
    """Until an answer alone begins, to the longest of the prompts."""
    tokens_per_second: float
    """Of eight answers at a time, on the machine of the export."""
    dtype: str | None = None
    """What engine `local` computes in; null for one that says it of nothing but the files."""
    device: str | None = None


class Speed(Record):
    """How fast one model came and answered."""

    dtype: str
    """What was computed in."""
    size_bytes: int
    """Of its weights on a disk."""
    load_s: float
    first_token_s: float
    """Until an answer alone begins, to the longest of the prompts."""
    tokens_per_second: float
    """Of all answers, their prompts included."""


class Speeds(Record):
    """A quantized model beside the one that it was made of: the same prompts in the same engine on the same machine.

    Both were asked beside what an export holds in memory: an endpoint may be faster with either.
    """

    engine: str
    version: str
    device: str
    num_answers: int
    """At a time."""
    num_tokens: int
    """Most of an answer, which nothing ends before."""
    before: Speed
    """The unquantized model as it would be served: its folder's load time, with the weights that were quantized."""
    after: Speed
    ratio: float
    """Of tokens per second, after / before."""
    first_token_ratio: float
    """Of seconds, after / before."""


class VerifyResult(Record):
    """What was proved by reading the written folder back."""

    num_prompts: int
    media: tuple[str, ...] = ()
    """The kinds of media that prompts were given with; none for a model of text."""
    num_positions: int
    logprobs: Difference
    top1_agreement: float
    """The fraction of positions whose most likely next token is the same."""
    greedy_agreement: float | None = None
    """The fraction of greedy tokens before the first that differs; null where neither an engine was asked nor anything
    quantized."""
    held_out: HeldOut | None = None
    """Null for a model of no run here that is not quantized, and where `held_out_reason` says why."""
    held_out_reason: str | None = None
    """Why the rows of the job could not be read again, for an export that is not quantized."""
    served: Served | None = None
    """Null where no serving engine was asked."""
    not_served: str | None = None
    """Why engine `local` was asked in vain, for an export that asked for no engine by name."""
    speed: Speeds | None = None
    """Null for an export that is not quantized, and where no serving engine was asked."""
    tokenizer_equal: bool
    chat_template_equal: bool
    processor_equal: bool = True
    """Whether the files of the processor make the same features; true for a model of text."""


class Vectors(Record):
    """What was proved of an embedding model by reading the written folder back: its vectors are the source's."""

    num_texts: int
    num_dims: int
