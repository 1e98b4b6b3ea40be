"""The export manifest `rayswift.json`: where the weights come from, what was proved, and the sha256 of every file.

Knows how a manifest is written last and when it can be trusted. Does not know how the files were made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from rayswift.errors import ExportError
from rayswift.evaluation.report import HarnessReport
from rayswift.export.measured import Difference, Quantization, Record, Vectors, VerifyResult
from rayswift.models.adapters import file_sha256
from rayswift.models.staging import sync_folder

MANIFEST = "rayswift.json"
UNFINISHED = ".rayswift-"
"""What files begin with that are on their way to their place: one that was left by a crash is nobody's."""
Signed = TypeVar("Signed", bound=Record)
_PACKAGES = ("rayswift", "torch", "transformers", "tokenizers", "safetensors", "peft")


class FileEntry(Record):
    """Size in bytes and sha256 (hex) of one file."""

    size: int
    sha256: str


class Lineage(Record):
    """What a checkpoint was made of."""

    checkpoint: str
    job: dict[str, Any]
    """The job file, defaults spelled out."""
    ledger: dict[str, Any]
    """What had been read of the data: counts, and the fingerprint of the stream."""
    ledger_sha256: str
    data: dict[str, str]
    """The sha256 of each file that was trained on; empty where the run's stream.json is not there."""
    layout: dict[str, int]
    base_quantization: str | None = None
    """How the base was packed in training: its weights are what the packed ones stand for; null for those stored."""
    rendered_with: dict[str, str] | None = None
    """The sha256 of each file of the base that rows were rendered with, see `models/folder.py`; null where the
    checkpoint does not say."""


class Earlier(Record):
    """The export that another one was made of, and the model that was trained or copied before either."""

    folder: str
    version: str
    quantizer: str
    """What its weights had been rounded by, then or in an export before it; none for the trained ones."""
    base: str
    base_sha256: str


class Evaluation(Record):
    """What a report of `rayswift eval` says. None is what was not measured."""

    report: str
    """Its name: beside the run, or in the folder of the export itself."""
    of: Literal["run", "export"] = "run"
    """The step of the run that was exported, in float32, before it was rounded or quantized; or the files that were
    written, computed with in float32."""
    sha256: str | None = None
    """Of a report in the folder of the export; null for one beside the run."""
    rows: dict[str, str | None]
    """The sha256 of each file that rows were read from; empty where only tasks were asked for."""
    num_rows: int
    loss: float | None
    perplexity: float | None
    exact_match: float | None
    num_answered: int | None = None
    """What `exact_match` is a fraction of; null in a manifest that is older than the count. So `num_judged`."""
    accuracy: float | None
    num_judged: int | None = None
    """What `accuracy` is a fraction of: by `evaluation/scores.py` not every answer can be judged."""
    harness: HarnessReport | None
    """What tasks of the lm-evaluation-harness gave."""


class ExportManifest(Record):
    """One export. Invariant: `files` were complete, and verified where `verify` is set, before this was written."""

    base: str
    """The model that was trained, or the exported folder itself."""
    base_sha256: str
    """Identity of the base's weights: sha256 over the names and contents of its safetensors files."""
    method: str | None
    """The training method; null for a folder that was not trained here."""
    adapter: dict[str, Any] | None
    """The settings of the adapter that was merged, then or into an earlier export; null for full fine-tuning."""
    quantizer: str = "none"
    quantization: Quantization | None = None
    """Null where `quantizer` is none."""
    dtype: str
    job_hash: str | None
    checkpoint_step: int | None
    run_finished: bool | None = None
    """Whether the checkpoint is the last one of a run that trained to its end; null without a checkpoint."""
    lineage: Lineage | None = None
    """Null for what was not trained here."""
    earlier: Earlier | None = None
    """The export at `base`, whose training this one's method, step and lineage tell of; null where that is none."""
    evaluations: tuple[Evaluation, ...] = ()
    versions: dict[str, str]
    merge: Difference | None
    """The merged model against base plus adapter, both in float32, the base packed where it was in training; null
    without an adapter, and where it had been merged before."""
    verify: VerifyResult | None
    """Null when verification was switched off, and for an embedding model."""
    vectors: Vectors | None = None
    """Null for a model that answers with text."""
    files: dict[str, FileEntry]
    rewriting: dict[str, FileEntry] = Field(default_factory=dict)
    """Files that an evaluation is putting there, each perhaps still as `files` says, or absent. Empty but for moments,
    and where that was cut short: the next evaluation mends it."""
    version: str | None = None
    """The export's version, which an evaluation does not change; null before the first, see `serving/versions.py`."""

    @property
    def is_verified(self) -> bool:
        """Whether the written folder was read back and compared."""
        return self.verify is not None or self.vectors is not None


def describe_files(folder: Path, manifest: str = MANIFEST) -> dict[str, FileEntry]:
    """Every file below `folder` but the `manifest`, by its path with forward slashes."""
    return {
        name: FileEntry(size=(folder / name).stat().st_size, sha256=file_sha256(folder / name))
        for name in _contents(folder, manifest)
    }


def _contents(folder: Path, manifest: str = MANIFEST) -> list[str]:
    """The path of everything below `folder` but plain folders and the manifest. A link to a folder is one entry."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    names = (path.relative_to(folder).as_posix() for path in paths)
    return [name for name in names if name != manifest and not name.startswith(UNFINISHED)]


def current_versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide what the files mean."""
    found = {"python": python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"  # rayswift itself, when run from a checkout
    return found


def write(manifest: Record, folder: Path, name: str = MANIFEST) -> None:
    """Write the manifest of a finished folder: flushed to disk beside its place, then renamed."""
    temporary = unfinished(folder, name)
    temporary.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    sync_folder(temporary)
    os.replace(temporary, folder / name)
    sync_folder(folder)


def unfinished(folder: Path, name: str) -> Path:
    """Where a file of the folder is written before it is put at its place."""
    return folder / f"{UNFINISHED}{name}.{os.getpid()}"


def read_valid(directory: str | os.PathLike[str]) -> ExportManifest:
    """The manifest of an export whose files are all there with the recorded size and sha256, and no others.

    A file that was added counts: an adapter_config.json or a weights index changes what is loaded. Raises ExportError
    naming the file that is missing, changed or added, or when there is no manifest.
    """
    return checked(directory, read, _check)


def checked(
    directory: str | os.PathLike[str], read: Callable[[str], Signed], check: Callable[[Path, Signed], None]
) -> Signed:
    """What is read of a folder and passes the check, which raises ExportError."""
    while True:
        manifest = read(str(directory))
        try:
            check(Path(directory), manifest)
            return manifest
        except ExportError:
            if read(str(directory)) == manifest:  # else an evaluation was put there in the meantime
                raise


def check_listed(folder: Path, files: Mapping[str, FileEntry], rewriting: Mapping[str, FileEntry]) -> None:
    """Raises ExportError unless every file that a manifest lists is there as it says."""
    for name, entry in files.items():
        _check_file(folder, name, entry, rewriting.get(name))


def _check(folder: Path, manifest: ExportManifest) -> None:
    check_listed(folder, manifest.files, manifest.rewriting)
    for name in (added := sorted(set(_contents(folder)) - set(manifest.files))):
        if name not in manifest.rewriting:
            more = f" and {len(added) - 1} more" if len(added) > 1 else ""
            raise ExportError(f"holds {name}{more}, which its manifest does not list", path=str(folder),
                              fix="move it elsewhere, or export again")  # fmt: skip
        _check_file(folder, name, manifest.rewriting[name])


def read(directory: str | os.PathLike[str]) -> ExportManifest:
    """The manifest of a folder as it is written there, nothing of it checked. Raises ExportError when there is none."""
    folder = Path(directory)
    try:
        return ExportManifest.model_validate_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ExportError(
            f"has no {MANIFEST}: it is no finished export", path=str(folder), fix="export again"
        ) from error
    except (ValidationError, UnicodeDecodeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ExportError(
            f"has a {MANIFEST} that cannot be read: {reason}", path=str(folder), fix="export again"
        ) from error


def _check_file(folder: Path, name: str, entry: FileEntry, announced: FileEntry | None = None) -> None:
    """Raises ExportError unless the file is what `entry` says, or what was `announced` to take its place."""
    try:
        _check_entry(folder, name, entry)
    except ExportError:
        # In this order: it may be put there at any moment, and is never taken away again.
        if announced is None or not is_as(folder / name, announced):
            raise


def _check_entry(folder: Path, name: str, entry: FileEntry) -> None:
    file = folder / name
    if not file.is_file():
        raise ExportError(f"lacks {name}", path=str(folder), fix="export again")
    if (size := file.stat().st_size) != entry.size:
        raise ExportError(f"has {name} with {size} bytes instead of {entry.size}", path=str(folder), fix="export again")
    if file_sha256(file) != entry.sha256:
        raise ExportError(f"has {name} with another sha256 than its manifest", path=str(folder), fix="export again")


def is_as(file: Path, entry: FileEntry) -> bool:
    """Whether a file is there and what the entry says."""
    return file.is_file() and file.stat().st_size == entry.size and file_sha256(file) == entry.sha256
