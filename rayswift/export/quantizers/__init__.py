"""Quantizers, one module each: `Config`, `needs_rows`, `bounds` and the modifiers of llm-compressor that they are.

A quantizer says what becomes of the weights and activations of linear layers; which layers, on which rows and how it
is proved is known by `export/quantize.py` and `export/verify.py`. Modules here import llm-compressor in `modifiers`
only, so that a Config can be read without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from rayswift.export.terms import Bounds

FAMILY = "export.quantizers"


class Settings(BaseModel):
    """Base of every Config: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Layers:
    """Which linear layers are quantized: all but those whose names fit the patterns of `ignore`.

    `blocks` begins the names in the blocks of a language model that has towers beside it, whose layers are called the
    same; None where llm-compressor finds the layers of a block itself, by the name of the architecture.
    """

    ignore: tuple[str, ...]
    blocks: str | None = None


class Quantizer(ABC):
    """What the export asks of a quantizer. Made from its Config."""

    Config: ClassVar[type[Settings]]
    needs_rows: ClassVar[bool]
    """Whether it looks at activations: it is calibrated on rows then, layer by layer."""

    is_packed: ClassVar[bool] = False
    """Whether weights alone become integers, several of them in one word."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def group_size(self) -> int:
        """Inputs of a layer that share a scale, -1 for all of them: every layer's inputs must be a multiple of it."""
        return int(getattr(self.config, "group_size", -1))

    @property
    @abstractmethod
    def bounds(self) -> Bounds:
        """How far the result may be from the unquantized model, unless the user says otherwise."""

    @abstractmethod
    def modifiers(self, layers: Layers) -> list[Any]:
        """llm-compressor's recipe for these layers."""


def weight_groups(bits: int, group_size: int, *, symmetric: bool) -> dict[str, Any]:
    """llm-compressor's `config_groups` for integer weights of linear layers; activations stay as they are."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    grouped: dict[str, Any] = {"strategy": "channel"}
    if group_size > 0:
        grouped = {"strategy": "group", "group_size": group_size}
    weights = QuantizationArgs.model_validate({"num_bits": bits, "type": "int", "symmetric": symmetric, **grouped})
    return {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
