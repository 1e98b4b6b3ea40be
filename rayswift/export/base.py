"""Whether the base of what is exported or measured is the one that it was trained on, and its adapter goes on it.

Reads files and headers; loads no model.
"""

from __future__ import annotations

from pathlib import Path

from rayswift.errors import ConfigError, ExportError, RaySwiftError
from rayswift.export.source import Source
from rayswift.models.adapter_folder import check_sizes_fit
from rayswift.models.adapters import weights_sha256
from rayswift.models.folder import read_json, rendered_otherwise

_FIX = "put the base back as it was"


def check_base(what: Source, base: Path, *, error: type[RaySwiftError] = ExportError) -> str:
    """The identity of the base's weights, which lie at `base`.

    Raises `error` when they are not those it was trained on, or when rows would be rendered otherwise than they were,
    ConfigError for the folder of an adapter whose tensors are not of the base's sizes.
    """
    trained = what.checkpoint or what.adapter_dir or "what it holds"
    if others := rendered_otherwise(what.lineage.rendered_with if what.lineage else None, base):
        raise error(
            f"has another {', '.join(others)} than {trained} was trained with",
            path="model.path", value=what.base, fix=_FIX,
        )  # fmt: skip
    found = weights_sha256(base)
    if what.base_sha256 is not None and what.base_sha256 != found:
        raise error(
            f"has changed since {trained} was trained on it", path="model.path", value=what.base, fix=_FIX
        )  # fmt: skip
    if what.adapter_dir is not None:
        check_sizes_fit(str(base), what.adapter_dir)
    return found


def check_rounds_once(what: Source, base: Path, quantizer: str) -> None:
    """Raises ConfigError for a base that compressed-tensors has packed: what is rounded twice is nobody's bounds."""
    config = read_json(base / "config.json", field="model.path").get("quantization_config")
    if not isinstance(config, dict) or config.get("quant_method") != "compressed-tensors":
        return
    better = what.lineage.checkpoint if what.lineage else what.earlier.base if what.earlier else "the model it is from"
    raise ConfigError(
        f"would round again what is quantized already in {what.base}", path="--quantizer", value=quantizer,
        fix=f"quantize {better}",
    )  # fmt: skip
