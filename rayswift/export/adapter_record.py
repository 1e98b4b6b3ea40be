"""What the folder of an adapter says of itself: where it comes from, what was proved of it, and its files.

Knows how it is read and when it can be trusted. Does not know how adapters are written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from rayswift.errors import ExportError
from rayswift.export import manifest as manifests
from rayswift.export.manifest import Evaluation, FileEntry, Lineage
from rayswift.export.measured import Difference, Record

RECORD = "rayswift_adapter.json"
"""Not the name of an export's manifest: what has that one is a model."""


class AdapterManifest(Record):
    """One adapter folder. Invariant: `files` were complete and proved before this was written."""

    base: str
    base_sha256: str
    method: str | None
    settings: dict[str, Any] | None
    job_hash: str | None
    checkpoint_step: int | None
    run_finished: bool | None
    lineage: Lineage | None
    versions: dict[str, str]
    verify: Difference
    """Base plus adapter, read back from disk, against base plus adapter as trained, both in float32 and not packed."""
    evaluations: tuple[Evaluation, ...] = ()
    """Of the base with this adapter."""
    files: dict[str, FileEntry]
    rewriting: dict[str, FileEntry] = Field(default_factory=dict)
    version: str | None = None
    """As those of an export's manifest."""


def read_valid(folder: str) -> AdapterManifest:
    """The record of an adapter folder whose files are those it lists. Raises ExportError naming one that is not.

    Files that were added do not count: of an adapter's folder nothing else is loaded.
    """
    return manifests.checked(folder, read, lambda at, made: manifests.check_listed(at, made.files, made.rewriting))


def read(folder: str) -> AdapterManifest:
    """The record of an adapter folder. Raises ExportError where there is none."""
    try:
        return AdapterManifest.model_validate_json((Path(folder) / RECORD).read_bytes())
    except (OSError, ValidationError) as error:
        raise ExportError(f"has no {RECORD}", path=folder, fix="export again") from error
