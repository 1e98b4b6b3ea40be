"""What there is to export: a run, one of its checkpoints, a saved adapter, or an ordinary Hugging Face folder.

Knows how the four are told apart and where each keeps base, tensors and job. Does not know how they become one model.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from rayswift import plugins
from rayswift.config.job import AdapterSpec, DataSpec, Job, ModelSpec, Part
from rayswift.data.rendering import Rendering
from rayswift.errors import CheckpointError, ConfigError
from rayswift.export import adapter_record
from rayswift.export import manifest as export_manifest
from rayswift.export.adapter_record import AdapterManifest
from rayswift.export.manifest import Earlier, ExportManifest, Lineage
from rayswift.models.adapters import ADAPTER_CONFIG, read_binding
from rayswift.models.loading import local_folder, split_id
from rayswift.serving.versions import version_of

if TYPE_CHECKING:
    import torch

    from rayswift.training.checkpoint import CheckpointManifest
    from rayswift.training.run_dir import RunDir


@dataclass(frozen=True)
class Source:
    """What is exported. At most one of `checkpoint` (trained tensors) and `adapter_dir` (a peft folder) is set."""

    base: str
    checkpoint: str | None = None
    adapter_dir: str | None = None
    adapter: AdapterSpec | None = None
    freeze: tuple[Part, ...] = ()
    """Parts that were not trained: the checkpoint lacks them, and the base has them."""
    settings: dict[str, Any] | None = None
    """Of the adapter, where a record tells of them that an earlier export has left."""
    method: str | None = None
    job_hash: str | None = None
    step: int | None = None
    finished: bool | None = None
    """Whether the run had trained to its end at this step; None without a checkpoint."""
    passed_over: tuple[str, ...] = ()
    """Why each newer checkpoint of the run was not taken, newest first."""
    base_sha256: str | None = None
    """The identity of the base when it was trained, where that was recorded."""
    packed: ModelSpec | None = None
    """How the base was packed in training; None where the adapter was trained on it as it is stored."""
    data: DataSpec | None = None
    """What was trained on; None for a folder that was not trained here."""
    rendering: Rendering | None = None
    """How its method renders rows; None without a method."""
    lineage: Lineage | None = None
    """What the checkpoint was made of; None without one."""
    earlier: Earlier | None = None
    """The export that `base` is; None for any other folder."""

    @property
    def is_plain(self) -> bool:
        """Whether it is a model folder, to which nothing trained here is added."""
        return self.checkpoint is None and self.adapter_dir is None

    @property
    def run(self) -> RunDir | None:
        """The run directory of the checkpoint; None without one."""
        from rayswift.training.run_dir import RunDir

        return RunDir(_run_of(self.checkpoint)) if self.checkpoint else None

    def weights(self) -> Mapping[str, torch.Tensor]:
        """The trained tensors of the checkpoint, whole and on the CPU, under their Hugging Face or peft names."""
        from rayswift.training.checkpoint import load_weights

        assert self.checkpoint is not None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant
            return load_weights(self.checkpoint)

    def adapter_settings(self) -> dict[str, Any] | None:
        """The adapter as plain data; None for full fine-tuning and for plain folders."""
        if self.adapter is not None:
            return self.adapter.model_dump(mode="json")
        if self.adapter_dir is None:
            return self.settings
        trained_on = {"base_quantization": self.packed.quantization} if self.packed else {}
        return {**(self.settings or {}), "name": "lora", "folder": self.adapter_dir, **trained_on}


def resolve(source: str, *, field: str = "SOURCE") -> Source:
    """What lies at `source`: a run directory or checkpoint (path or fsspec URL), an adapter folder, a model.

    Raises ConfigError naming `field` when it is none of them, CheckpointError when no checkpoint can be trusted,
    ExportError when it is an earlier export that was changed.
    """
    from rayswift.training import checkpoint
    from rayswift.training.run_dir import RunDir

    if Path(source, export_manifest.MANIFEST).is_file():
        return _of_folder(source)  # before the adapter: an adapter_config.json in an export was added to it
    if Path(source, ADAPTER_CONFIG).is_file():
        return _of_adapter(source)
    if Path(source, "config.json").is_file():
        return _of_folder(source)
    place = RunDir(source)
    if place.exists(checkpoint.FOLDER) or place.exists("job.yaml"):
        path = checkpoint.newest(source)
        return replace(_of_checkpoint(path, checkpoint.read_manifest(path)), passed_over=_passed_over(place, path))
    if place.exists(checkpoint.MANIFEST):
        return _of_checkpoint(source, checkpoint.check(source))
    if not place.exists(""):
        return _of_hub(source, field)
    raise ConfigError(
        "is neither a run, a checkpoint, an adapter nor a Hugging Face folder",
        path=field,
        value=source,
        fix=_run_near(source) or "give the run directory OUTPUT/NAME of a training job, or a folder with config.json",
    )


def _run_near(source: str) -> str | None:
    """Which run was meant by the folder that runs lie in, or that lies in a run; None without one."""
    from rayswift.training import checkpoint

    def is_run(folder: Path) -> bool:
        return (folder / "job.yaml").is_file() or (folder / checkpoint.FOLDER).is_dir()

    here = Path(source)
    if not here.is_dir():
        return None
    runs = [here.parent] if is_run(here.parent) else sorted(filter(is_run, here.iterdir()))
    return f"did you mean {' or '.join(str(run) for run in runs[:3])}?" if runs else None


def _of_checkpoint(path: str, found: CheckpointManifest) -> Source:
    job = Job.model_validate(found.job)
    return Source(
        base=job.model.path,
        checkpoint=path,
        adapter=job.adapter,
        freeze=job.model.freeze,
        method=job.method.name,
        job_hash=found.job_hash,
        step=found.step,
        finished=found.finished,
        base_sha256=getattr(found, "base_sha256", None),
        packed=_packed(job.model.path, job.model.dtype, job.model.quantization),
        data=job.data,
        lineage=_lineage(path, found),
        rendering=plugins.load("methods", job.method.name, path="method.name").rendering,
    )


def _packed(base: str, dtype: Any, quantization: Any) -> ModelSpec | None:
    """The base as training loads it, but for kernels that want a GPU; None where it is not packed."""
    if not quantization:
        return None
    try:
        return ModelSpec(path=base, dtype=dtype, quantization=quantization)
    except ValidationError as error:  # of an adapter's folder: a job was checked before
        raise ConfigError(
            f"packs its base as {quantization} in {dtype}, which is unknown here", path="adapter", value=base,
            fix="use an adapter folder as RaySwift wrote it, and the version that did",
        ) from error  # fmt: skip


def _run_of(checkpoint: str) -> str:
    """`RUN/checkpoints/step-00000050` -> `RUN`."""
    return checkpoint.rstrip("/").rsplit("/", 2)[0]


def _lineage(path: str, found: CheckpointManifest) -> Lineage:
    from rayswift.data.stream_json import parse_stream
    from rayswift.training.run_dir import STREAM, RunDir

    run, data = RunDir(_run_of(path)), {}
    if run.exists(STREAM):
        with suppress(ValueError):  # of another version: the fingerprint in the ledger still tells one from another
            data = {file.path: file.sha256 for file in parse_stream(run.read_text(STREAM)).files}
    ledger = json.dumps(found.ledger, sort_keys=True)
    return Lineage(
        checkpoint=path, job=found.job, ledger=found.ledger, layout=found.layout, data=data,
        ledger_sha256=hashlib.sha256(ledger.encode()).hexdigest(),
        base_quantization=found.job["model"].get("quantization"), rendered_with=found.rendered_with,
    )  # fmt: skip


def _passed_over(place: RunDir, taken: str) -> tuple[str, ...]:
    """What is wrong with the checkpoints of a run that are newer than the one taken."""
    from rayswift.training import checkpoint

    reasons, newer = [], Path(taken).name
    for entry in sorted(place.fs.ls(place.path(checkpoint.FOLDER), detail=False), reverse=True):
        name = Path(str(entry)).name
        if not name.startswith("step-") or name <= newer:
            continue
        try:
            checkpoint.check(f"{place.url}/{checkpoint.FOLDER}/{name}")
        except CheckpointError as error:
            reasons.append(str(error))
    return tuple(reasons)


def _of_adapter(path: str) -> Source:
    binding = read_binding(path)
    found = Source(
        base=binding["base"], adapter_dir=path, base_sha256=binding["base_sha256"],
        packed=_packed(binding["base"], binding.get("dtype"), binding.get("quantization")),
    )  # fmt: skip
    if not Path(path, adapter_record.RECORD).is_file():  # as peft or a script of the user's wrote it
        return found
    record = adapter_record.read_valid(path)
    return replace(found, settings=record.settings, **_inherited(record))


def _of_folder(path: str) -> Source:
    if not Path(path, export_manifest.MANIFEST).is_file():
        return Source(base=path)
    record = export_manifest.read_valid(path)
    before = record.earlier or record
    quantizer = before.quantizer if record.quantizer == "none" else record.quantizer
    earlier = Earlier(
        folder=path, version=str(version_of(path)), quantizer=quantizer, base=before.base,
        base_sha256=before.base_sha256,
    )  # fmt: skip
    return replace(Source(base=path), settings=record.adapter, earlier=earlier, **_inherited(record))


def _inherited(record: ExportManifest | AdapterManifest) -> dict[str, Any]:
    """What a record tells of the training, for what is made of its folder."""
    return {
        "method": record.method, "job_hash": record.job_hash, "step": record.checkpoint_step,
        "finished": record.run_finished, "lineage": record.lineage,
    }  # fmt: skip


def _of_hub(source: str, field: str) -> Source:
    """A hub id; anything else that is not there is a mistake in the path."""
    name, _ = split_id(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ConfigError("does not exist", path=field, value=source, fix="check the path")
    local_folder(source, weights=False, field=field)
    return Source(base=source)
