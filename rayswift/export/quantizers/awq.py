"""AWQ (arXiv 2306.00978): 4-bit weights, scaled before so that those that large activations meet lose least."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from rayswift.export.quantizers import Layers, Quantizer, Settings, weight_groups
from rayswift.export.terms import Bounds

_SMOOTHED = {
    "input_layernorm": ("q_proj", "k_proj", "v_proj"),
    "v_proj": ("o_proj",),
    "post_attention_layernorm": ("gate_proj", "up_proj"),
    "up_proj": ("down_proj",),
}
"""What gives a scale away, and the layers behind it that take it, in blocks like Llama's."""


class Awq(Quantizer):
    """Asymmetric weights of 4 bits; activations stay as they are."""

    class Config(Settings):
        """`--quantizer awq`."""

        bits: Literal[4] = 4
        group_size: Literal[32, 64, 128] = 128

    needs_rows: ClassVar[bool] = True
    is_packed: ClassVar[bool] = True

    @property
    def bounds(self) -> Bounds:
        """As the base says."""
        return Bounds(None, 0.5, top1=0.8, perplexity=1.1)

    def modifiers(self, layers: Layers) -> list[Any]:
        """As the base says."""
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier

        groups = weight_groups(self.config.bits, self.config.group_size, symmetric=False)
        mappings = None
        if layers.blocks:
            mappings = [
                AWQMapping(f"{layers.blocks}.*{smooth}$", [f"{layers.blocks}.*{name}$" for name in balanced])
                for smooth, balanced in _SMOOTHED.items()
            ]
        return [
            AWQModifier(mappings=mappings, duo_scaling="both"),
            QuantizationModifier(config_groups=groups, ignore=list(layers.ignore)),
        ]
