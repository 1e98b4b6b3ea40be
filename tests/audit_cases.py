"""Run directories as training leaves them, made without a model: a stream read by some ranks, step by step."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rayswift.data.blocks import local_blocks, step_inputs
from rayswift.data.ledger import Ledger
from rayswift.data.quarantine import Quarantine
from rayswift.data.stream import StreamPlan
from rayswift.data.stream_json import stream_json
from rayswift.data.types import StepInput
from rayswift.planning.layout import Layout
from rayswift.training.checkpoint import MANIFEST, CheckpointManifest, RowsEntry, folder_name
from rayswift.training.row_record import RecordFile, file_name, from_bytes, in_order, to_bytes
from rayswift.training.run_dir import QUARANTINE, ROWS, STREAM, RunDir
from tests.job_cases import make_job


class FakeRun:
    """A run that trains on nothing and records its rows as real ones do. `crash` forgets what no checkpoint holds."""

    def __init__(self, folder: Path, plan: StreamPlan, tokenizer: PreTrainedTokenizerBase, *, batch: int = 12) -> None:
        self.place, self.plan, self.tokenizer, self.batch = RunDir(str(folder)), plan, tokenizer, batch
        self.step, self.ledger, self.head = 0, Ledger.start(plan.fingerprint), None
        self.layout: tuple[int, str] | None = None
        self.saved: tuple[int, Ledger, RowsEntry | None] = (0, self.ledger, None)
        self.place.write_text(STREAM, stream_json(plan))

    def train(self, steps: int, *, ranks: int, save_every: int = 2) -> bool:
        """Take up to `steps` steps with so many data ranks, saving now and then; whether the stream has ended."""
        quarantine = Quarantine(f"{self.place.url}/{QUARANTINE}", self.plan.rows_at_stake, 1.0)
        streams = [self._steps(rank, ranks) for rank in range(ranks)]
        held: list[list[tuple[int, np.ndarray]]] = [[] for _ in streams]
        for _ in range(steps):
            shares = [next(stream) for stream in streams]
            if not sum(share.num_sequences for share in shares):
                self._save(held, finished=True)
                return True
            self.step += 1
            self._advance(shares)
            quarantine.add(row for share in shares for row in share.bad_rows)
            for mine, share in zip(held, shares, strict=True):
                if share.rows is not None:
                    mine.append((self.step, share.rows))
            if self.step % save_every == 0:
                self._save(held)
        return False

    def crash(self) -> None:
        """The process is gone; another one begins where the newest checkpoint stands."""
        self.step, self.ledger, self.head = self.saved
        for name in self.place.names(ROWS):
            if name > file_name(self.step):
                self.place.remove(f"{ROWS}/{name}")

    def _steps(self, rank: int, ranks: int) -> Iterator[StepInput]:
        blocks = local_blocks(
            self.plan, self.tokenizer, data_rank=rank, data_size=ranks, global_batch_size=self.batch, ledger=self.ledger
        )
        return step_inputs(blocks, sequences_per_step=self.batch // ranks, micro_batch_size=1, pad_id=0)

    def _advance(self, shares: list[StepInput]) -> None:
        self.layout = max((share.layout for share in shares if share.layout), default=self.layout)
        self.ledger = self.ledger.advanced(
            position=shares[-1].position,
            rows_visited=sum(share.num_rows_visited for share in shares),
            rows_trained=sum(share.num_rows for share in shares),
            rows_quarantined=sum(len(share.bad_rows) for share in shares),
            tokens=sum(share.num_tokens for share in shares),
        )

    def _save(self, held: list[list[tuple[int, np.ndarray]]], *, finished: bool = False) -> None:
        if any(held):
            self.head = write_rows(self.place, self.step, RecordFile(in_order(held), self.plan.fingerprint, self.head))
        for mine in held:
            mine.clear()
        mine = self.layout is not None and self.layout[0] == self.ledger.chunk and self.ledger.sequence
        layout = self.layout[1] if mine and self.layout else None
        self.saved = (self.step, replace(self.ledger, layout=layout), self.head)
        write_manifest(self.place, self.step, self.ledger, self.head, finished=finished, epochs=self.plan.epochs)


def write_rows(place: RunDir, step: int, file: RecordFile) -> RowsEntry:
    """A file of the record, and the entry that names it."""
    content = to_bytes(file)
    name = f"{ROWS}/{file_name(step)}"
    place.write_bytes(name, content)
    return RowsEntry(name=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def write_manifest(
    place: RunDir, step: int, ledger: Ledger, rows: RowsEntry | None, *, finished: bool = False, epochs: int = 1
) -> None:
    """A checkpoint that holds nothing but its manifest."""
    job = make_job(**{"train.epochs": epochs})
    manifest = CheckpointManifest(
        step=step, finished=finished, job_hash="", job=job.model_dump(mode="json"), layout=vars(Layout()),
        engine="fsdp2", ledger=ledger.to_dict(), seed=0, versions={}, files={}, rows=rows,
    )  # fmt: skip
    place.write_text(f"{folder_name(step)}/{MANIFEST}", manifest.model_dump_json())


def newest_manifest(run: Path) -> CheckpointManifest:
    """That of the newest checkpoint."""
    return CheckpointManifest.model_validate_json(sorted(run.glob("checkpoints/*/manifest.json"))[-1].read_text())


def forge(run: Path, change: Any) -> Path:
    """The run with the tables of its record replaced by `change(tables)`, and every hash made to fit again."""
    place, manifest = RunDir(str(run)), newest_manifest(run)
    files: list[tuple[str, RecordFile]] = []
    entry = manifest.rows
    while entry is not None:
        files.insert(0, (entry.name, from_bytes(place.read_bytes(entry.name))))
        entry = files[0][1].previous
    tables = change([file.rows for _, file in files])
    head: RowsEntry | None = None
    for (name, file), table in zip(files, tables, strict=True):
        head = write_rows(place, int(name[-16:-8]), RecordFile(table, file.fingerprint, head))
    place.write_text(
        f"{folder_name(manifest.step)}/{MANIFEST}", manifest.model_copy(update={"rows": head}).model_dump_json()
    )
    return run


def copy_of(run: Path, name: str) -> Path:
    """A copy beside it, to be tampered with."""
    shutil.copytree(run, run.parent / name)
    return run.parent / name
