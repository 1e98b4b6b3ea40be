"""What clients may know of where a served model comes from: a few fields of the manifest that its folder has.

Knows which of them tell nothing of the machine: a path is cut to its last name. What an export holds in full is known
by `export/manifest.py`.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from rayswift.errors import ExportError
from rayswift.serving.versions import version_of

if TYPE_CHECKING:
    from rayswift.export.manifest import ExportManifest


def lineage_of(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The version of an export and what it was made of, as the field `rayswift` of /v1/models; None for any other.

    Its files are not read again: that they are those of the manifest is proved when the endpoint starts.
    """
    from rayswift.export import manifest

    version = version_of(folder)
    if version is None:
        return None
    try:
        return {"version": version, **_shown(manifest.read(folder))}
    except ExportError:  # of another version of RaySwift; the folder is served all the same
        return {"version": version}


def _shown(export: ExportManifest) -> dict[str, Any]:
    job = export.lineage.job if export.lineage else {}
    before = export.earlier or export
    held_out = export.verify.held_out if export.verify else None
    return {
        "run": job.get("name"),
        "base": _last_name(before.base),
        "base_sha256": before.base_sha256,
        "method": export.method,
        "checkpoint_step": export.checkpoint_step,
        "run_finished": export.run_finished,
        "job_hash": export.job_hash,
        "quantizer": export.quantizer,
        "dtype": export.dtype,
        "perplexity_ratio": held_out and held_out.perplexity_ratio,
        "verified": export.is_verified,
    }


def _last_name(base: str) -> str:
    """`Qwen3-8B@main` of `Qwen/Qwen3-8B@main`: a relative path looks like the id of a hub, and is not to be told."""
    return re.split(r"[/\\]", base.rstrip("/\\"))[-1]
