"""rows/: which rows each step was trained on, for good. Parquet files that are only ever added, each naming the last.

`rows/step-00000050.parquet` has a line for each document of the steps since the file before it, up to step 50, and for
each row that was quarantined on the way. A checkpoint's manifest names the newest file with its sha256, that file the
one before it, and so on: whoever trusts a checkpoint can trust the record, and no manifest grows. Files of steps that
a crash has undone are removed when the run continues, whatever its new layout; the steps write them again.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch.distributed as dist

from rayswift.data.row_keys import CUT, QUARANTINED, ROWS_DTYPE, split_keys
from rayswift.planning.layout import Seat
from rayswift.training.checkpoint import RowsEntry
from rayswift.training.run_dir import ROWS, RunDir

_METADATA = b"rayswift"
_MAX_ROWS_HELD = 1 << 18
"""Rows of all ranks that may wait for the next checkpoint; 21 bytes each. More are written before it comes."""
OUTCOMES = ("trained", "continued", "quarantined")
"""What became of a row: its first document was trained on, a further one of a split row was, or it is a bad row."""
SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("chunk", pa.int32()),
        ("sequence", pa.int32()),
        ("num_sequences", pa.int32()),
        ("file", pa.int32()),
        ("row", pa.int64()),
        ("outcome", pa.dictionary(pa.int8(), pa.string())),
        ("cut", pa.bool_()),
    ]
)
"""`file` is the number of a file in stream.json, `row` counts from 0, `cut` means that the row lost tokens."""


_Held = tuple[list[tuple[int, np.ndarray]], tuple[int, str] | None]
"""What a rank holds: its rows of each step, and the newest layout of a chunk that it has met."""


@dataclass(frozen=True)
class RecordFile:
    """One file of the record: its rows, the stream they are rows of, and the file before it."""

    rows: pa.Table
    fingerprint: str
    previous: RowsEntry | None


class RowRecord:
    """The record of a run that goes on. Every method is called by all ranks at the same steps; rank 0 writes."""

    def __init__(
        self,
        run_dir: RunDir,
        seat: Seat,
        fingerprint: str,
        *,
        step: int,
        head: RowsEntry | None,
        layout: tuple[int, str] | None,
    ) -> None:
        """Continues behind `head`, the newest file of the checkpoint of `step`; what was written later is removed.

        `layout` is that of the chunk where the checkpoint stands.
        """
        self._run_dir, self._seat, self._fingerprint, self._head = run_dir, seat, fingerprint, head
        self._speaks = seat.data_leader(seat.data_rank) == seat.rank
        self._held: list[tuple[int, np.ndarray]] = []
        self._num_held, self._since = 0, step
        self._layout = layout
        self._group = dist.new_group(backend="gloo") if seat.layout.world_size > 1 else None
        if seat.rank == 0:
            for name in run_dir.names(ROWS):
                if name > file_name(step):
                    run_dir.remove(f"{ROWS}/{name}")

    def add(self, step: int, rows: np.ndarray | None, num_rows: int, layout: tuple[int, str] | None) -> None:
        """Keep this rank's `rows` of a step, of which all ranks together have `num_rows`; see `StepInput.layout`."""
        self._layout = layout or self._layout
        if self._speaks and rows is not None:
            self._held.append((step, rows))
        self._num_held += num_rows
        if self._num_held >= _MAX_ROWS_HELD:
            self.commit(step)

    def commit(self, step: int) -> RowsEntry | None:
        """The newest file, on rank 0, with all rows up to `step` on disk; None as long as there was none."""
        if step > self._since:
            held = self._gathered()
            if held is not None:
                self._head = self._write(step, in_order([rows for rows, _ in held]))
                self._layout = max((layout for _, layout in held if layout), default=None)
        self._held, self._num_held, self._since = [], 0, step
        return self._head

    def layout_of(self, chunk: int) -> str | None:
        """The layout of the chunk that the newest file ends in, on rank 0; None where it is not known."""
        return self._layout[1] if self._layout is not None and self._layout[0] == chunk else None

    def _gathered(self) -> list[_Held] | None:
        """What each data rank holds, in their order; on rank 0."""
        seat = self._seat
        if seat.layout.world_size == 1:
            return [(self._held, self._layout)]
        everyone: list[_Held] | None = [([], None)] * seat.layout.world_size if seat.rank == 0 else None
        dist.gather_object((self._held, self._layout), everyone, dst=0, group=self._group)
        return everyone and [everyone[seat.data_leader(data_rank)] for data_rank in range(seat.data_size)]

    def _write(self, step: int, table: pa.Table) -> RowsEntry:
        content = to_bytes(RecordFile(table, self._fingerprint, self._head))
        name = f"{ROWS}/{file_name(step)}"
        self._run_dir.write_bytes(name, content)
        return RowsEntry(name=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def file_name(step: int) -> str:
    """`step-00000050.parquet`: the rows up to this step."""
    return f"step-{step:08d}.parquet"


def to_bytes(file: RecordFile) -> bytes:
    """A file of the record, as it lies in the run directory."""
    import pyarrow.parquet as parquet

    previous = file.previous.model_dump() if file.previous else None
    named = json.dumps({"fingerprint": file.fingerprint, "previous": previous})
    stream = io.BytesIO()
    parquet.write_table(
        file.rows.replace_schema_metadata({_METADATA: named.encode()}), stream, compression="zstd",
        column_encoding={"row": "DELTA_BINARY_PACKED"}, use_dictionary=["step", "chunk", "sequence", "num_sequences",
                                                                        "file", "outcome"],
    )  # fmt: skip
    return stream.getvalue()


def from_bytes(content: bytes) -> RecordFile:
    """The file that `to_bytes` wrote. Raises ValueError for anything else."""
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(io.BytesIO(content))
        named = json.loads(table.schema.metadata[_METADATA])
        previous = RowsEntry.model_validate(named["previous"]) if named["previous"] else None
        return RecordFile(table.cast(SCHEMA), named["fingerprint"], previous)
    except (pa.ArrowException, OSError, KeyError, TypeError) as error:
        raise ValueError(f"is no record of rows: {error}") from error


def in_order(parts: list[list[tuple[int, np.ndarray]]]) -> pa.Table:
    """The ranks' rows step by step: shares are contiguous in rank order, so this is the order of the stream."""
    steps = sorted((step, rank, rows) for rank, part in enumerate(parts) for step, rows in part)
    rows = np.concatenate([rows for _, _, rows in steps]) if steps else np.empty(0, ROWS_DTYPE)
    numbers = np.repeat([step for step, _, _ in steps], [len(rows) for _, _, rows in steps])
    files, places, continued = split_keys(rows["key"])
    outcomes = np.where(rows["flags"] & QUARANTINED, 2, continued.astype(np.int8)).astype(np.int8)
    return pa.table(
        {
            "step": numbers.astype(np.int32),
            **{name: rows[name] for name in ("chunk", "sequence", "num_sequences")},
            "file": files.astype(np.int32),
            "row": places,
            "outcome": pa.DictionaryArray.from_arrays(outcomes, OUTCOMES),
            "cut": (rows["flags"] & CUT).astype(bool),
        },
        schema=SCHEMA,
    )
