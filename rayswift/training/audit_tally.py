"""Counts a record of rows by epoch, file and row, and holds it against the plan of the stream.

Memory is six bytes per row of the data files and epoch, however long the record is.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import pyarrow as pa

from rayswift.data.row_keys import planned_keys, split_keys
from rayswift.data.stream import StreamPlan
from rayswift.training.audit_report import Problems, SourceRows
from rayswift.training.row_record import OUTCOMES

_COUNTED = ("trained", "quarantined", "truncated", "split")


class _Epoch:
    """How often each row of all files, laid end to end, was trained on and quarantined; if it was cut, or split."""

    def __init__(self, num_rows: int) -> None:
        self.trained = np.zeros(num_rows, np.uint16)
        self.quarantined = np.zeros(num_rows, np.uint16)
        self.truncated = np.zeros(num_rows, bool)
        self.split = np.zeros(num_rows, bool)


class Tally:
    """What a record says about each row. Rows are added in any order; `judge` comes last."""

    def __init__(self, plan: StreamPlan, end: tuple[int, int], problems: Problems) -> None:
        """`end` is where the checkpoint stands: a chunk, and how many of its sequences were trained on."""
        self._plan, self._end, self._problems = plan, end, problems
        self._starts = np.cumsum([0, *(file.num_rows for file in plan.files)])
        self._epochs = [_Epoch(int(self._starts[-1])) for _ in range(plan.epochs)]
        self._epoch_of = np.array([plan.chunk(index).epoch for index in range(plan.num_chunks)], np.int64)
        self._next = (0, 0)

    def add(self, rows: pa.Table) -> None:
        """One more table of the record, the next one in its order."""
        self._check_order(rows)
        chunks, files, places = (rows.column(name).to_numpy() for name in ("chunk", "file", "row"))
        known = (chunks < self._plan.num_chunks) & (chunks >= 0) & (files < len(self._plan.files)) & (files >= 0)
        known[known] &= places[known] < np.diff(self._starts)[files[known]]
        for at in np.flatnonzero(~known):
            self._problems.add(f"the record has row {places[at]} of file {files[at]} in chunk {chunks[at]}, "
                               "which the stream does not have")  # fmt: skip
        outcomes = rows.column("outcome").combine_chunks().cast(pa.string()).to_numpy(zero_copy_only=False)[known]
        cut = rows.column("cut").to_numpy()[known]
        epochs, flat = self._epoch_of[chunks[known]], self._starts[files[known]] + places[known]
        trained, continued, quarantined = (outcomes == name for name in OUTCOMES)
        for number in np.unique(epochs):
            mine, epoch = epochs == number, self._epochs[number]
            np.add.at(epoch.trained, flat[mine & trained], 1)
            np.add.at(epoch.quarantined, flat[mine & quarantined], 1)
            epoch.truncated[flat[mine & cut]] = True
            epoch.split[flat[mine & continued]] = True

    def judge(self) -> None:
        """Tell every row that did not come as often as planned up to the checkpoint."""
        if self._next != self._end:
            self._problems.add(
                f"the record ends before {_place(self._next)}, its checkpoint before {_place(self._end)}"
            )
        for number, epoch in enumerate(self._epochs):
            due, begun = self._planned(number)
            seen = epoch.trained + epoch.quarantined
            for flat in np.flatnonzero((seen < due) | (seen > due + begun)):
                self._problems.add(
                    f"{self._named(int(flat))} in epoch {number + 1}: trained on {_times(epoch.trained[flat])}, "
                    f"quarantined {_times(epoch.quarantined[flat])}, planned {_times((due + begun)[flat])}"
                )
            for flat in np.flatnonzero(epoch.split & (epoch.trained == 0) & (due > 0)):
                self._problems.add(f"{self._named(int(flat))} in epoch {number + 1}: trained on without its beginning")

    def total(self, what: str) -> int:
        """A count over all epochs and sources: `trained`, `quarantined`, `truncated` or `split`."""
        return sum(int(getattr(epoch, what).sum()) for epoch in self._epochs)

    def source(self, number: int) -> SourceRows:
        """What became of the rows of a source, in all epochs."""
        counts = dict.fromkeys(_COUNTED, 0)
        for index, file in enumerate(self._plan.files):
            if file.source == number:
                part = slice(self._starts[index], self._starts[index + 1])
                for what in _COUNTED:
                    counts[what] += sum(int(getattr(epoch, what)[part].sum()) for epoch in self._epochs)
        read = counts["trained"] + counts["quarantined"]
        return SourceRows(path=self._plan.sources[number].path, read=read, **counts,
                          remaining=self._planned_of_source[number] - read)  # fmt: skip

    def quarantined_rows(self) -> Iterator[tuple[int, int]]:
        """(file, row) of each row that was quarantined in some epoch."""
        anywhere = np.zeros(int(self._starts[-1]), bool)
        for epoch in self._epochs:
            anywhere |= epoch.quarantined > 0
        return (self._file_and_row(int(flat)) for flat in np.flatnonzero(anywhere))

    def name(self, file: int, row: int) -> str:
        """A row by its identity: source, file, hash of the file, and number (from 0)."""
        index = self._plan.files[file]
        return f"row {row} of {index.path} (sha256 {index.sha256[:12]}, source {index.source})"

    def _named(self, flat: int) -> str:
        return self.name(*self._file_and_row(flat))

    def _file_and_row(self, flat: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._starts, flat, side="right")) - 1
        return file, flat - int(self._starts[file])

    def _planned(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """How often each row should have come before the checkpoint, and may have come in the chunk it stands in."""
        due, begun = (np.zeros(int(self._starts[-1]), np.uint16) for _ in range(2))
        chunk, sequence = self._end
        for index in np.flatnonzero(self._epoch_of == epoch):
            if index < chunk or (index == chunk and sequence):
                files, rows, _ = split_keys(planned_keys(self._plan, self._plan.chunk(int(index))))
                np.add.at(due if index < chunk else begun, self._starts[files] + rows, 1)
        return due, begun

    @cached_property
    def _planned_of_source(self) -> list[int]:
        """Rows of each source in all epochs, repeated ones as often as they are repeated."""
        planned = [0] * len(self._plan.sources)
        for index in range(self._plan.num_chunks):
            for part in self._plan.chunk(index).parts:
                planned[self._plan.files[part.file].source] += part.num_rows
        return planned

    def _check_order(self, rows: pa.Table) -> None:
        """Tell where the sequences of the record do not follow on one another: each is trained on once, and whole."""
        found = np.stack([rows.column(name).to_numpy() for name in ("chunk", "sequence", "num_sequences", "step")])
        borders = np.flatnonzero(np.any(found[:, 1:] != found[:, :-1], axis=0)) + 1
        for at in [0, *borders.tolist()] if rows.num_rows else []:
            chunk, sequence, of, step = (int(value) for value in found[:, at])
            if (chunk, sequence) != self._next:
                self._problems.add(
                    f"step {step} was trained on {_place((chunk, sequence))} where {_place(self._next)} was due"
                )
            self._next = (chunk + 1, 0) if sequence + 1 == of else (chunk, sequence + 1)


def _place(position: tuple[int, int]) -> str:
    return f"sequence {position[1]} of chunk {position[0]}"


def _times(count: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(int(count), f"{count} times")
