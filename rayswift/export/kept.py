"""A report of `rayswift eval` put into the folder of the export that it is of: the file, the manifest and the card.

An export that was proved stays proved whenever this is killed, and for whoever reads it meanwhile: the manifest first
announces the new files beside the old ones, then they are put there, then it lists them and what they say. Those who
evaluate the same export at the same time come one after the other. Measures nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from rayswift.errors import ExportError
from rayswift.evaluation.report import EvalReport, name_among, text_of
from rayswift.export import adapter_record
from rayswift.export import manifest as manifests
from rayswift.export.adapter_record import AdapterManifest
from rayswift.export.card import CARD, CURVES, card_of
from rayswift.export.evaluations import evaluation
from rayswift.export.manifest import MANIFEST, UNFINISHED, Evaluation, ExportManifest, FileEntry, Lineage, is_as
from rayswift.locks import taken
from rayswift.models.staging import sync_folder
from rayswift.serving.versions import version_of

Signed = TypeVar("Signed", ExportManifest, AdapterManifest)
RECORDS = (MANIFEST, adapter_record.RECORD)
"""The manifest of an export, and that of an adapter exported alone."""
_WAIT_S = 60.0
_OUTPUT = "keep the report elsewhere with --output FILE"


def manifest_name(folder: str | os.PathLike[str]) -> str | None:
    """The manifest that a folder has: that of an export, or of an adapter exported alone; None for any other."""
    return next((name for name in RECORDS if (Path(folder) / name).is_file()), None)


def lineage_of(folder: str | os.PathLike[str]) -> Lineage | None:
    """What an export is made of, or an adapter exported alone; None for what was not trained here."""
    name = manifest_name(folder)
    if name == MANIFEST:
        return manifests.read(folder).lineage
    return None if name is None else adapter_record.read(os.fspath(folder)).lineage


def version_evaluated(folder: str | os.PathLike[str]) -> str | None:
    """The version of what `rayswift export` wrote, an adapter's too; None for any other folder."""
    name = manifest_name(folder)
    return None if name is None else version_of(folder, name)


def keep(report: EvalReport, folder: str, name: str, other: str | None = None) -> str:
    """The name of a finished evaluation's report put into an export's folder, in its manifest and on its card.

    That is `name`, of which a report is replaced, or `other` where that one is of other rows. Raises ExportError,
    everything being as it was before, for a folder that is no export or not the version that was evaluated, and where
    it cannot be written.
    """
    place = Path(os.path.realpath(folder))
    try:
        with _sole_writer(place):
            if other is not None:
                name = name_among(report, (name, other), lambda one: _content(place / one))
            _keep(report, place, name)
    except OSError as error:
        raise ExportError(f"does not keep the report of its evaluation: {error.strerror or error}", path="TARGET",
                          value=folder, fix=_OUTPUT) from error  # fmt: skip
    return name


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _keep(report: EvalReport, place: Path, name: str) -> None:
    record = manifest_name(place)
    if record is None:
        raise ExportError(f"has no {MANIFEST}, so no report is kept with it", path="TARGET", value=str(place),
                          fix=f"export it, or {_OUTPUT}")  # fmt: skip
    version = version_of(place, record)
    if version != report.target.version:
        raise ExportError(f"is version {version} now, and {report.target.version} was evaluated: the report is not "
                          "kept with it", path="TARGET", value=str(place), fix="evaluate it again")  # fmt: skip
    if record == MANIFEST:
        _put(manifests.read(place), record, version, place, {name: text_of(report).encode()})
        return
    _put(adapter_record.read(str(place)), record, version, place, {name: text_of(report).encode()})


def _put(manifest: Signed, record: str, version: str | None, place: Path, reports: Mapping[str, bytes]) -> None:
    """Write reports and the card, each step of it a folder that is whole."""
    for left in place.glob(f"{UNFINISHED}*"):
        left.unlink()  # by somebody who was killed: who writes is alone here
    before = _mended(manifest, place)
    evaluations = before.evaluations
    for name, content in reports.items():
        evaluations = _with(evaluations, _said(name, content))
    after = before.model_copy(update={"evaluations": evaluations, "version": version})
    contents = dict(reports)
    if isinstance(after, ExportManifest):
        contents[CARD] = card_of(after, place.name, has_curves=CURVES in after.files).encode()
    entries = {name: _entry(content) for name, content in contents.items()}
    try:
        for name, content in contents.items():  # before anything is announced: a disk that is full says so here
            _write(manifests.unfinished(place, name), content)
        manifests.write(before.model_copy(update={"rewriting": entries, "version": version}), place, record)
        for name in contents:
            os.replace(manifests.unfinished(place, name), place / name)
        sync_folder(place)
        files = dict(sorted({**after.files, **entries}.items()))
        manifests.write(after.model_copy(update={"files": files}), place, record)
    except BaseException:
        with suppress(OSError):
            for left in place.glob(f"{UNFINISHED}*"):
                left.unlink()
        raise


def _mended(manifest: Signed, place: Path) -> Signed:
    """A manifest that announces nothing: what an evaluation that was cut short had put there is taken as it is."""
    files, evaluations = dict(manifest.files), manifest.evaluations
    for name, entry in manifest.rewriting.items():
        if not is_as(place / name, entry):
            continue  # not put there yet
        files[name] = entry
        if name != CARD:
            evaluations = _with(evaluations, _said(name, (place / name).read_bytes()))
    return manifest.model_copy(update={"files": files, "evaluations": evaluations, "rewriting": {}})


def _said(name: str, content: bytes) -> Evaluation:
    return evaluation(name, json.loads(content), hashlib.sha256(content).hexdigest())


def _with(evaluations: tuple[Evaluation, ...], new: Evaluation) -> tuple[Evaluation, ...]:
    """Those of the run first, then those of the export by name, the new one in the place of an older one."""
    own = {one.report: one for one in (*evaluations, new) if one.of == "export"}
    return (*(one for one in evaluations if one.of == "run"), *(own[name] for name in sorted(own)))


def _entry(content: bytes) -> FileEntry:
    return FileEntry(size=len(content), sha256=hashlib.sha256(content).hexdigest())


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sync_folder(path)


@contextmanager
def _sole_writer(place: Path) -> Iterator[None]:
    """Hold a folder for the duration, without a file in it that its manifest would have to list."""
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not taken(descriptor, _WAIT_S):
            raise OSError(errno.EBUSY, f"another evaluation has held it for {_WAIT_S:.0f} s")
        yield
    finally:
        os.close(descriptor)
