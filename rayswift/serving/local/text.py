"""From token ids to text a client may see: whole characters only, and never a stop string or a part of one.

Knows a tokenizer's `decode`. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile

from rayswift.serving.engine import INCOMPLETE

Decode = Callable[[list[int]], str]
_CONTEXT_TOKENS = 4
"""Of a prompt that are decoded with its answer, and more where these say nothing."""
_MOST_UNFINISHED_TOKENS = 3
"""At the end of a text: the begin of a character has three bytes at most."""


class Detokenizer:
    """Decodes the ids of an answer one by one, as what follows its prompt.

    What it returns, joined, is what `decode(prompt and answer)` has behind `decode(prompt)`, without an unfinished last
    character. Alone, an answer would lose the space before its first word, which many decoders take for the begin of a
    text. A character that the prompt begins and the answer ends is the answer's.

    Only the ids since the last safe place are decoded again: those whose text was just returned, and those that are
    held back.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()) -> None:
        self._decode, self._ids = decode, _context(decode, prompt)
        self._num_shown = _num_finished(decode, self._ids)
        self._shown, self._of_prompt = decode(self._ids[: self._num_shown]), ""
        self._of_prompt = self._new_text(self._ids)  # that may be read otherwise once the answer goes on

    def push(self, token_id: int) -> str:
        """The text that this id completes; empty while a character is unfinished."""
        self._ids.append(token_id)
        new = self._new_text(self._ids)
        if not new or new.endswith(INCOMPLETE):
            return ""
        del self._ids[: self._num_shown]
        self._all_are_shown()
        return new

    def text_of(self, token_id: int) -> str:
        """What `push` would return for an id, but INCOMPLETE for a part of a character that is still unfinished."""
        new = self._new_text([*self._ids, token_id])
        is_part = new.endswith(INCOMPLETE) or (not new and self._of_prompt)
        return INCOMPLETE if is_part else new

    def finish(self) -> str:
        """What was held back, without the unfinished character at its end."""
        new = self._new_text(self._ids).rstrip(INCOMPLETE)
        self._all_are_shown()
        return new

    def _all_are_shown(self) -> None:
        self._num_shown, self._shown, self._of_prompt = len(self._ids), self._decode(self._ids), ""

    def _new_text(self, ids: list[int]) -> str:
        """What ids say that begin with those that are shown."""
        text = self._decode(ids)
        # Bytes that are no characters can change how those before them are read, whose text is out already.
        goes_on = text.startswith(self._shown)
        new = text[len(self._shown) :] if goes_on else self._decode(ids[self._num_shown :])
        num_same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(new, self._of_prompt, strict=False)))
        return new[num_same:]


def _context(decode: Decode, prompt: Sequence[int]) -> list[int]:
    """The last ids of a prompt that have a text which begins with a whole character; all of them where none do."""
    num = _CONTEXT_TOKENS
    while num < len(prompt):
        for longer in range(_MOST_UNFINISHED_TOKENS + 1):  # one of them begins where a character does
            text = decode(ids := list(prompt[-num - longer :]))
            if text.rstrip(INCOMPLETE) and not text.startswith(INCOMPLETE):
                return ids
        num *= 2
    return list(prompt)


def _num_finished(decode: Decode, ids: Sequence[int]) -> int:
    """How many of the ids there are before a character that the last ones begin."""
    least = max(0, len(ids) - _MOST_UNFINISHED_TOKENS)
    whole = (num for num in range(len(ids), least, -1) if not decode(list(ids[:num])).endswith(INCOMPLETE))
    return next(whole, least)


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

    def __init__(self, decode: Decode, stops: Sequence[str], prompt: Sequence[int] = ()) -> None:
        self._detokenizer, self._matcher = Detokenizer(decode, prompt), StopMatcher(stops)

    def text_of(self, token_id: int) -> str:
        """What a token would add to the answer here, INCOMPLETE for a part of a character."""
        return self._detokenizer.text_of(token_id)

    def push(self, token_id: int) -> tuple[str, bool]:
        """(text that may be shown now, whether a stop string ended the answer)."""
        return self._matcher.push(self._detokenizer.push(token_id))

    def finish(self) -> tuple[str, bool]:
        """The rest of the text when no more tokens come, and whether a stop string turned up in it."""
        text, stopped = self._matcher.push(self._detokenizer.finish())
        return (text, True) if stopped else (text + self._matcher.finish(), False)
