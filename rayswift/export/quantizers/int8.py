"""INT8 weights and activations: SmoothQuant (arXiv 2211.10438) moves outliers into the weights, GPTQ rounds those."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from rayswift.export.quantizers import Layers, Quantizer, Settings
from rayswift.export.terms import Bounds

_SMOOTHED = {
    "input_layernorm": ("q_proj", "k_proj", "v_proj"),
    "post_attention_layernorm": ("gate_proj", "up_proj"),
}
"""What outliers are taken from, and the layers behind it that get them, in blocks like Llama's."""


class Int8(Quantizer):
    """A scale for each output of a layer, and for each token of its input while it runs."""

    class Config(Settings):
        """`--quantizer int8`."""

        smoothing: Annotated[float, Field(ge=0, le=1)] = 0.8

    needs_rows: ClassVar[bool] = True

    @property
    def bounds(self) -> Bounds:
        """As the base says."""
        return Bounds(None, 0.2, top1=0.9, perplexity=1.02, engine=0.25)

    def modifiers(self, layers: Layers) -> list[Any]:
        """As the base says."""
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        mappings = [
            [[f"{layers.blocks}.*{name}$" for name in balanced], f"{layers.blocks}.*{smooth}$"]
            for smooth, balanced in _SMOOTHED.items()
        ]
        return [
            SmoothQuantModifier(smoothing_strength=self.config.smoothing, mappings=mappings if layers.blocks else None),
            GPTQModifier(targets=["Linear"], scheme="W8A8", ignore=list(layers.ignore)),
        ]
