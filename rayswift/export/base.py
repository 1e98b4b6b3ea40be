"""Whether the base of what is exported or measured is the one that it was trained on, and its adapter goes on it.

Reads files and headers; loads no model.
"""

from __future__ import annotations

from pathlib import Path

from rayswift.errors import ExportError, RaySwiftError
from rayswift.export.source import Source
from rayswift.models.adapter_folder import check_sizes_fit
from rayswift.models.adapters import weights_sha256
from rayswift.models.folder import rendered_otherwise

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
