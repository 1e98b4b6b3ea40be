"""GPTQ (arXiv 2210.17323): integer weights, each rounded so that it makes up for the error of those before it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from rayswift.export.quantizers import Layers, Quantizer, Settings, weight_groups
from rayswift.export.terms import Bounds


class Gptq(Quantizer):
    """Symmetric weights of 4 or 8 bits; activations stay as they are."""

    class Config(Settings):
        """`--quantizer gptq`."""

        bits: Literal[4, 8] = 4
        group_size: Literal[-1, 32, 64, 128] = 128

    needs_rows: ClassVar[bool] = True
    is_packed: ClassVar[bool] = True

    @property
    def bounds(self) -> Bounds:
        """As the base says."""
        return (
            Bounds(None, 0.5, top1=0.8, perplexity=1.1)
            if self.config.bits == 4
            else Bounds(None, 0.1, top1=0.95, perplexity=1.01)
        )

    def modifiers(self, layers: Layers) -> list[Any]:
        """As the base says."""
        from llmcompressor.modifiers.gptq import GPTQModifier

        groups = weight_groups(self.config.bits, self.config.group_size, symmetric=True)
        return [GPTQModifier(config_groups=groups, ignore=list(layers.ignore))]
