"""Plain text in the column `text`: pretraining documents, C4, wiki dumps, the rows of a `.txt` file."""

from __future__ import annotations

from typing import Any

from rayswift.data.conversation import reject_media, required
from rayswift.data.types import Sample


class Text:
    """A document per row."""

    def matches(self, columns: frozenset[str]) -> int:
        """5 with `text`: any conversational format that fits too is preferred."""
        return 5 if "text" in columns else 0

    def normalise(self, row: dict[str, Any]) -> Sample:
        """The document. Raises RowError when it is missing, empty or not text."""
        reject_media(row)
        return Sample(text=required(row.get("text"), "text"))
