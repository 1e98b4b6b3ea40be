"""Images, sounds and videos with what is to be said of them: a text, caption, transcription or label.

The rows of image and audio folders, of WebDataset archives, and of datasets for classification and speech. What is
asked of them stands in the row, or in `question` of the source; without either, the media alone are the question.
"""

from __future__ import annotations

from typing import Any

from rayswift.data.conversation import QUERIES, conversation, kind, only, question, required, system_turn
from rayswift.data.formats import RowError
from rayswift.data.media.columns import COLUMNS
from rayswift.data.types import Message, Sample

ANSWERS = ("text", "caption", "transcription", "transcript", "sentence", "label")


class Captioned:
    """One question per row, which its media stand before if it has no tags, and one answer."""

    def matches(self, columns: frozenset[str]) -> int:
        """7 with media and an answer: above plain text, below every format of turns and pairs."""
        return 7 if columns & set(COLUMNS) and columns & set(ANSWERS) else 0

    def normalise(self, row: dict[str, Any]) -> Sample:
        """The conversation. Raises RowError without media, and where the answer is missing, empty, or there twice."""
        if not any(row.get(name) for name in COLUMNS):
            raise RowError("has no image, sound or video")
        asked = question(row) if any(row.get(name) for name in QUERIES) else ""
        return conversation(row, [*system_turn(row), Message("user", asked), Message("assistant", _answer(row))])


def _answer(row: dict[str, Any]) -> str:
    name = only(row, ANSWERS)
    value = row.get(name)
    if isinstance(value, bool):
        raise RowError(f"`{name}` is {kind(value)}, not a text or the name of a class")
    return str(value) if name == "label" and isinstance(value, int) else required(value, name)
