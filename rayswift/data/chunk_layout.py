"""Which documents share a sequence in a chunk: what packing decided, kept so that a resume need not decide it again.

Packing needs the lengths of all rows of a chunk, so a run that continues inside one would tokenize (and decode the
media of) rows that it has trained on already. A checkpoint keeps the layout of the chunk it stands in; with it only
the rows of the sequences that are left are prepared, and of those first what the first step needs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

Document = tuple[int, int]
"""The key of a row (see `row_keys`) and which of its documents is meant, from 0."""


@dataclass(frozen=True)
class ChunkLayout:
    """The documents of each sequence of chunk `chunk`, in order."""

    chunk: int
    sequences: tuple[tuple[Document, ...], ...]

    @classmethod
    def of(cls, chunk: int, sequences: Iterable[Iterable[Document]]) -> ChunkLayout:
        """The layout of a chunk."""
        return cls(chunk, tuple(map(tuple, sequences)))

    def to_json(self) -> str:
        """About 14 bytes per document."""
        plain = [[number for document in one for number in document] for one in self.sequences]
        return json.dumps({"chunk": self.chunk, "sequences": plain}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ChunkLayout:
        """The layout that `to_json` wrote."""
        plain = json.loads(text)
        return cls.of(plain["chunk"], (zip(one[::2], one[1::2], strict=True) for one in plain["sequences"]))

    def count_for(self, first: int, num_documents: int) -> int:
        """How many sequences from `first` on hold so many documents; all that are left where there are fewer."""
        held = count = 0
        for one in self.sequences[first:]:
            if held >= num_documents:
                break
            held, count = held + len(one), count + 1
        return count


def numbered(keys: Iterable[int]) -> Iterator[Document]:
    """The documents of rows in their order, whose keys are complemented where they continue a row."""
    piece = 0
    for key in keys:
        piece = piece + 1 if key < 0 else 0
        yield (~key if key < 0 else key), piece
