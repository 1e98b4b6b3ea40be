"""FP8 (E4M3) weights and activations: a scale for each output, and for each token of the input while it runs."""

from __future__ import annotations

from typing import Any, ClassVar

from rayswift.export.quantizers import Layers, Quantizer, Settings
from rayswift.export.terms import Bounds


class Fp8(Quantizer):
    """Needs no rows: nothing of it depends on activations seen before."""

    class Config(Settings):
        """`--quantizer fp8`."""

    needs_rows: ClassVar[bool] = False

    @property
    def bounds(self) -> Bounds:
        """As the base says."""
        return Bounds(None, 0.2, top1=0.9, perplexity=1.02, engine=0.25)

    def modifiers(self, layers: Layers) -> list[Any]:
        """As the base says."""
        from llmcompressor.modifiers.quantization import QuantizationModifier

        return [QuantizationModifier(targets=["Linear"], scheme="FP8_DYNAMIC", ignore=list(layers.ignore))]
