"""The export manifest `rayswift.json`: where the weights come from, what was proved, and the sha256 of every file.

Knows how a manifest is written last and when it can be trusted. Does not know how the files were made.
"""

from __future__ import annotations

import math
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from rayswift.errors import ExportError
from rayswift.evaluation.report import HarnessReport
from rayswift.models.adapters import file_sha256
from rayswift.models.staging import sync_folder

MANIFEST = "rayswift.json"
_PACKAGES = ("rayswift", "torch", "transformers", "tokenizers", "safetensors", "peft")


class Record(BaseModel):
    """Base of everything the manifest holds: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(Record):
    """Size in bytes and sha256 (hex) of one file."""

    size: int
    sha256: str


class Difference(Record):
    """Absolute differences of log-probabilities over all prompt positions and the whole vocabulary, and bounds."""

    max_abs: float
    mean_abs: float
    bound_max_abs: float | None
    """None for a quantized model: one token in thousands may move far without harm."""
    bound_mean_abs: float

    @property
    def within(self) -> bool:
        """Whether both figures are numbers within their bounds."""
        bound = math.inf if self.bound_max_abs is None else self.bound_max_abs
        return self.max_abs <= bound and self.mean_abs <= self.bound_mean_abs


class RowsUsed(Record):
    """Rows that an export was calibrated or judged on."""

    files: dict[str, str]
    """The sha256 of each file that they were read from."""
    num_rows: int
    num_tokens: int
    sha256: str
    """Of their token ids."""


class HeldOut(Record):
    """What quantizing cost on rows that it did not see: loss per trained token, and the ratio of perplexities."""

    rows: RowsUsed
    reference_loss: float
    loss: float
    perplexity_ratio: float
    bound_perplexity_ratio: float
    top1_agreement: float
    """The fraction of trained tokens whose place has the same most likely token."""
    bound_top1_agreement: float


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


class Quantization(Record):
    """How the weights were quantized. `ignore` has the patterns of the linear layers that were not."""

    quantizer: str
    settings: dict[str, Any]
    num_layers: int
    ignore: tuple[str, ...]
    fraction: float
    """Of the weights in the language model's blocks that were quantized."""
    bytes_before: int
    """Size of the weights before, in the dtype of the export."""
    calibration: RowsUsed | None = None
    """Null for a quantizer that needs no rows."""
    versions: dict[str, str]


class Served(Record):
    """What a serving engine said from the written folder, beside transformers reading the same folder in float32."""

    engine: str
    version: str
    num_positions: int
    mean_abs: float
    """Of the differences of log-probabilities of the prompts' own tokens."""
    max_abs: float
    bound_mean_abs: float
    greedy_agreement: float
    """The fraction of greedy tokens before the first that differs from the unquantized model's."""
    greedy_regret: float | None = None
    """How much less likely its greedy tokens are than transformers' likeliest, on average of log-probabilities."""
    template_equal: bool
    """Whether the server makes the ids of a chat that training made."""
    media_equal: bool = True
    """As `template_equal`, of the questions about media among the prompts; true for a model of text."""
    load_s: float
    tokens_per_second: float
    """Of eight answers at a time, on the machine of the export."""


class VerifyResult(Record):
    """What was proved by reading the written folder back."""

    num_prompts: int
    media: tuple[str, ...] = ()
    """The kinds of media that prompts were given with; none for a model of text."""
    num_positions: int
    logprobs: Difference
    top1_agreement: float
    """The fraction of positions whose most likely next token is the same."""
    greedy_agreement: float | None = None
    """The fraction of greedy tokens before the first that differs; null for an export that is not quantized."""
    held_out: HeldOut | None = None
    """Null for an export that is not quantized: the bounds on log-probabilities are narrower."""
    served: Served | None = None
    """Null where no serving engine was asked."""
    tokenizer_equal: bool
    chat_template_equal: bool
    processor_equal: bool = True
    """Whether the files of the processor make the same features; true for a model of text."""


class Vectors(Record):
    """What was proved of an embedding model by reading the written folder back: its vectors are the source's."""

    num_texts: int
    num_dims: int


class Evaluation(Record):
    """What a report of `rayswift eval` beside the run says of the step exported. None is what was not measured."""

    report: str
    rows: dict[str, str | None]
    """The sha256 of each file that rows were read from; empty where only tasks were asked for."""
    num_rows: int
    loss: float | None
    perplexity: float | None
    exact_match: float | None
    accuracy: float | None
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
    """The settings of the adapter that was merged; null for full fine-tuning."""
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
    evaluations: tuple[Evaluation, ...] = ()
    """Of the trained model in float32, before it was rounded or quantized."""
    versions: dict[str, str]
    merge: Difference | None
    """The merged model against base plus adapter, both in float32, the base packed where it was in training; null
    without an adapter."""
    verify: VerifyResult | None
    """Null when verification was switched off, and for an embedding model."""
    vectors: Vectors | None = None
    """Null for a model that answers with text."""
    files: dict[str, FileEntry]

    @property
    def is_verified(self) -> bool:
        """Whether the written folder was read back and compared."""
        return self.verify is not None or self.vectors is not None


def describe_files(folder: Path) -> dict[str, FileEntry]:
    """Every file below `folder` but the manifest, by its path with forward slashes."""
    return {
        name: FileEntry(size=(folder / name).stat().st_size, sha256=file_sha256(folder / name))
        for name in _contents(folder)
    }


def _contents(folder: Path) -> list[str]:
    """The path of everything below `folder` but plain folders and the manifest. A link to a folder is one entry."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    return [name for path in paths if (name := path.relative_to(folder).as_posix()) != MANIFEST]


def current_versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide what the files mean."""
    found = {"python": python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"  # rayswift itself, when run from a checkout
    return found


def write(manifest: ExportManifest, folder: Path) -> None:
    """Write the manifest of a finished folder: flushed to disk beside its place, then renamed."""
    temporary = folder / f".{MANIFEST}.{os.getpid()}"
    temporary.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    sync_folder(temporary)
    os.replace(temporary, folder / MANIFEST)
    sync_folder(folder)


def read_valid(directory: str | os.PathLike[str]) -> ExportManifest:
    """The manifest of an export whose files are all there with the recorded size and sha256, and no others.

    A file that was added counts: an adapter_config.json or a weights index changes what is loaded. Raises ExportError
    naming the file that is missing, changed or added, or when there is no manifest.
    """
    folder, manifest = Path(directory), read(directory)
    for name, entry in manifest.files.items():
        _check_file(folder, name, entry)
    if added := sorted(set(_contents(folder)) - set(manifest.files)):
        more = f" and {len(added) - 1} more" if len(added) > 1 else ""
        raise ExportError(
            f"holds {added[0]}{more}, which its manifest does not list",
            path=str(folder),
            fix="move it elsewhere, or export again",
        )
    return manifest


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


def _check_file(folder: Path, name: str, entry: FileEntry) -> None:
    file = folder / name
    if not file.is_file():
        raise ExportError(f"lacks {name}", path=str(folder), fix="export again")
    if (size := file.stat().st_size) != entry.size:
        raise ExportError(f"has {name} with {size} bytes instead of {entry.size}", path=str(folder), fix="export again")
    if file_sha256(file) != entry.sha256:
        raise ExportError(f"has {name} with another sha256 than its manifest", path=str(folder), fix="export again")
