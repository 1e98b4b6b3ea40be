"""Proves from the run directory what became of every row: `rayswift data audit RUN`.

What should have come is worked out again from the stream's plan (stream.json); what came is read from the record of
rows that the newest checkpoint vouches for (rows/) and from quarantine.jsonl. The counts that training kept are only
compared with what is found. The data files are not opened: their hashes are in the plan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import PurePath

import pyarrow as pa

from rayswift.data.ledger import Ledger
from rayswift.data.stream import StreamPlan
from rayswift.data.stream_json import parse_stream
from rayswift.errors import DataError
from rayswift.training import checkpoint
from rayswift.training.audit_report import AuditReport, Problems
from rayswift.training.audit_tally import Tally
from rayswift.training.checkpoint import CheckpointManifest, RowsEntry
from rayswift.training.row_record import RecordFile, from_bytes
from rayswift.training.run_dir import QUARANTINE, STREAM, RunDir


def audit(run_dir: str) -> AuditReport:
    """What became of the rows up to the newest checkpoint; what does not add up is in its `problems`.

    Raises CheckpointError for a run without a checkpoint, DataError for one whose stream is not known.
    """
    place = RunDir(run_dir)
    manifest = checkpoint.read_manifest(checkpoint.newest(run_dir, verify=False))
    ledger = checkpoint.ledger_of(manifest)
    plan = _plan(place, ledger)
    problems = Problems()
    tally = Tally(plan, plan.position(ledger), problems)
    for rows in _record(place, manifest, problems):
        tally.add(rows)
    tally.judge()
    _check_quarantine(place, plan, tally, problems)
    _check_counts(manifest, ledger, plan, tally, problems)
    return AuditReport(
        run_dir=run_dir,
        step=manifest.step,
        finished=manifest.finished,
        epochs=plan.epochs,
        sources=tuple(tally.source(number) for number in range(len(plan.sources))),
        problems=tuple(problems.shown),
        num_problems=problems.num,
    )


def _plan(place: RunDir, ledger: Ledger) -> StreamPlan:
    try:
        plan = parse_stream(place.read_text(STREAM))
    except FileNotFoundError as error:
        raise DataError("lacks stream.json: nothing says which rows should have come", path=place.url) from error
    except ValueError as error:
        raise DataError("has a stream.json that cannot be read: it was changed", path=place.url) from error
    if plan.fingerprint != ledger.fingerprint:
        raise DataError("has a checkpoint of another stream than its stream.json: one was changed", path=place.url)
    return plan


def _record(place: RunDir, manifest: CheckpointManifest, problems: Problems) -> Iterator[pa.Table]:
    """The tables of the record, oldest first, each held against the sha256 that it was committed with."""
    if manifest.rows is None and manifest.step:
        problems.add(f"step {manifest.step} has no record of its rows: it was saved by a version that kept none")
    names: list[str] = []
    entry = manifest.rows
    while entry is not None:
        found = _read(place, entry, problems)
        if found is None:
            break  # what came before is named by nobody
        if found.fingerprint != manifest.ledger["fingerprint"]:
            problems.add(f"{entry.name} is a record of another stream")
            break
        names.append(entry.name)
        entry = found.previous
    return (from_bytes(place.read_bytes(name)).rows for name in reversed(names))


def _read(place: RunDir, entry: RowsEntry, problems: Problems) -> RecordFile | None:
    try:
        content = place.read_bytes(entry.name)
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            problems.add(f"{entry.name} was changed: its sha256 is not the one it was committed with")
        return from_bytes(content)
    except FileNotFoundError:
        problems.add(f"{entry.name} is missing")
    except ValueError:
        problems.add(f"{entry.name} cannot be read")
    return None


def _check_quarantine(place: RunDir, plan: StreamPlan, tally: Tally, problems: Problems) -> None:
    """Each quarantined row of the record has its reason in quarantine.jsonl, and no row is there that does not exist.

    Rows of steps that a crash undid may be there already: they will be met again.
    """
    listed = {(PurePath(row["file"]).name, row["sha256"], row["row"]) for row in place.read_jsonl(QUARANTINE)}
    for file, row in tally.quarantined_rows():
        index = plan.files[file]
        if (PurePath(index.path).name, index.sha256, row) not in listed:
            problems.add(f"{tally.name(file, row)} was quarantined, and {QUARANTINE} does not have it")
    sizes = {(PurePath(file.path).name, file.sha256): file.num_rows for file in plan.files}
    for name, sha256, row in sorted(listed):
        if row >= sizes.get((name, sha256), 0):
            problems.add(f"{QUARANTINE} has row {row} of {name} (sha256 {sha256[:12]}), which the stream does not have")


def _check_counts(
    manifest: CheckpointManifest, ledger: Ledger, plan: StreamPlan, tally: Tally, problems: Problems
) -> None:
    """The counts that training kept are those of the record, and a run that says it has finished has no rows left."""
    for what, kept, found in (
        ("trained on", ledger.rows_trained, tally.total("trained")),
        ("quarantined", ledger.rows_quarantined, tally.total("quarantined")),
    ):
        if kept != found:
            problems.add(f"the checkpoint counts {kept} rows {what}, its record has {found}")
    train = manifest.job["train"]
    whole = manifest.finished and train["max_steps"] is None and train["epochs"] == plan.epochs
    if whole and (left := plan.num_rows_total - tally.total("trained") - tally.total("quarantined")):
        problems.add(f"the run has finished, and {left} of {plan.num_rows_total} rows are left")
