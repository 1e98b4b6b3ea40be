"""From token ids to text a client may see: whole characters only, and never a stop string or a part of one.

Knows a tokenizer's `decode`. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"
"""What decoders write for bytes that are not a character (yet)."""
Decode = Callable[[list[int]], str]


class Detokenizer:
    """Decodes ids one by one. What it returns, joined, is `decode(all ids)` without an unfinished last character.

    Only the ids since the last safe place are decoded again: those whose text was just returned, because some
    decoders treat the first token of a text differently, and those that are held back.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode, self._ids = decode, list[int]()
        self._shown_from, self._held_from = 0, 0

    def push(self, token_id: int) -> str:
        """The text that this id completes; empty while a character is unfinished."""
        self._ids.append(token_id)
        new = self._new_text()
        if not new or new.endswith(_INCOMPLETE):
            return ""
        self._shown_from, self._held_from = self._held_from, len(self._ids)
        return new

    def finish(self) -> str:
        """What was held back, without the unfinished character at its end."""
        new = self._new_text().rstrip(_INCOMPLETE)
        self._held_from = len(self._ids)
        return new

    def _new_text(self) -> str:
        shown = self._decode(self._ids[self._shown_from : self._held_from])
        return self._decode(self._ids[self._shown_from :])[len(shown) :]


class StopMatcher:
    """Cuts a text that arrives in pieces before the stop string that is complete first.

    The result does not depend on how the text is cut into pieces. Of two stop strings complete at the same character,
    the longer one is cut off.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = tuple(stops), ""

    def push(self, piece: str) -> tuple[str, bool]:
        """(text that may be shown, whether a stop string is complete)."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)[1]], True
        keep = self._possible_start(text)
        self._held = text[keep:]
        return text[:keep], False

    def finish(self) -> str:
        """What was held back because it might have become a stop string."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """The first place from which the rest of `text` begins a stop string; its length if there is none."""
        longest = max(map(len, self._stops)) - 1
        for at in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[at:]) for stop in self._stops):
                return at
        return len(text)


class TextStream:
    """The visible text of one answer: Detokenizer, then StopMatcher."""

    def __init__(self, decode: Decode, stops: Sequence[str]) -> None:
        self._detokenizer, self._matcher = Detokenizer(decode), StopMatcher(stops)

    def push(self, token_id: int) -> tuple[str, bool]:
        """(text that may be shown now, whether a stop string ended the answer)."""
        return self._matcher.push(self._detokenizer.push(token_id))

    def finish(self) -> tuple[str, bool]:
        """The rest of the text when no more tokens come, and whether a stop string turned up in it."""
        text, stopped = self._matcher.push(self._detokenizer.finish())
        return (text, True) if stopped else (text + self._matcher.finish(), False)
