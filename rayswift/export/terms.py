"""The terms of an export: how far its result may be off, and what is asked of a quantizer, on which rows.

Nouns that rows, quantizers, judge and verify share. Imports none of them, and knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

NUM_HELD_OUT_QUANTIZED = 64
"""Rows that a quantized export is judged by."""


@dataclass(frozen=True)
class Bounds:
    """How far log-probabilities may lie apart, at most and on average.

    `top1` is the least fraction of positions whose most likely token is the same, `perplexity` the most that it may
    grow on held-out rows, as a ratio. `engine` is how far a serving engine may be off transformers on average, from the
    same files; None takes the dtype's bound.
    """

    max_abs: float | None
    mean_abs: float
    top1: float = 0.0
    perplexity: float = 1.0
    engine: float | None = None

    def with_mean(self, mean_abs: float | None) -> Bounds:
        """With another bound on average, and ten times that at most where there is one; None changes nothing."""
        if mean_abs is None:
            return self
        return replace(self, mean_abs=mean_abs, max_abs=None if self.max_abs is None else 10 * mean_abs)

    def with_perplexity(self, ratio: float | None) -> Bounds:
        """With another bound on the ratio of perplexities; None changes nothing."""
        return self if ratio is None else replace(self, perplexity=ratio)


DEFAULT_BOUNDS = {
    "float32": Bounds(1e-3, 1e-4, perplexity=1.001),
    "float16": Bounds(0.1, 0.005, perplexity=1.005),
    "bfloat16": Bounds(0.5, 0.05, perplexity=1.02),
}
"""Per dtype written. Float32 loses nothing but the order of sums; the others lose what rounding the
weights costs: a trained model of 1.3M parameters moves by 0.008 at most and 0.0004 on average in float16, by 0.054 and
0.004 in bfloat16, and larger models by more."""
MERGE_BOUNDS = Bounds(5e-3, 5e-4)
"""For merging an adapter in float32: rounding only, but of another product of matrices."""


@dataclass(frozen=True)
class QuantizeSpec:
    """What is asked of a quantized export: which quantizer, on which rows, and how far the result may be off."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the quantizer's Config: `bits`, `group_size`, ..."""
    calibration: str | None = None
    """A file of rows; None takes the job's own data."""
    num_calibration: int = 256
    num_held_out: int = NUM_HELD_OUT_QUANTIZED
    max_length: int | None = None
    """Longest row in tokens; None takes the job's."""
    max_perplexity: float | None = None
    """As a ratio; None takes the quantizer's bound. So with `min_agreement`, a fraction of positions."""
    min_agreement: float | None = None

    def bounds(self, own: Bounds) -> Bounds:
        """The quantizer's `own`, with what the user says of them."""
        given = {"perplexity": self.max_perplexity, "top1": self.min_agreement}
        return replace(own, **{name: value for name, value in given.items() if value is not None})
