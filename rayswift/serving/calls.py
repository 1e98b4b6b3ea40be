"""Calls read out of an answer as it is written: what is said, and what is called.

A call is a JSON object between marks. It ends where its JSON ends, and not at the first mark behind it: the texts among
its arguments may have such marks. What stands in a thought calls nothing, whatever it looks like. Knows the marks; what
is a call of a tool is known by `serving/tools.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rayswift.serving.tools import CLOSE, MAX_CALLS, OPEN, Call, Calling

THOUGHTS = ("think", "thinking", "reasoning", "thought")
"""Names of the marks that models put around their thoughts: `<think>` ... `</think>`."""
_OPENED = re.compile(rf"<({'|'.join(THOUGHTS)})>\Z")
_LONGEST = max(len(name) for name in THOUGHTS) + 2
_BEGINS = {OPEN: "", **{f"<{name}>": f"</{name}>" for name in THOUGHTS}}
"""Marks that are looked for outside of calls and thoughts, with what ends a thought."""
_SPACE = " \t\n\r"
_FIRST = re.compile(rf"[^{_SPACE}]")
_BETWEEN = re.compile(rf'["{{}}\[\]]|[^{_SPACE}\w:,.+-]', re.ASCII)
_WITHIN = re.compile(r'["\\\x00-\x1f]')
"""Characters of JSON that matter to where it ends, and those that cannot be there: before it, outside of its texts, in
them."""


def thought_end(prompt: str) -> str | None:
    """The mark that ends the thought which a prompt has begun for the answer (`<think>` is its end); None for none."""
    found = _OPENED.search(prompt.rstrip()[-_LONGEST:])
    return found and f"</{found[1]}>"


@dataclass
class JsonEnd:
    """Finds where a JSON object ends. It looks at each character once, however the text is cut.

    What it takes for an object may be none; what is one, it takes for one.
    """

    _depth: int = 0
    _is_text: bool = False
    _is_escaped: bool = False

    def end_in(self, text: str, at: int) -> int | None:
        """The place behind the object, which goes on at a place of this text; None where it does not end in it.

        Raises ValueError for what can become no object.
        """
        while at < len(text):
            if self._is_escaped:
                self._is_escaped, at = False, at + 1
                continue
            pattern = _WITHIN if self._is_text else _BETWEEN if self._depth else _FIRST
            found = pattern.search(text, at)
            if found is None:
                return None
            at = found.end()
            self._take(found[0])
            if not self._depth:
                return at
        return None

    def _take(self, character: str) -> None:
        if self._is_text:
            self._is_text, self._is_escaped = character != '"', character == "\\"
            if character not in '"\\':
                raise ValueError("a line ends in a text")
        elif character == "{" or (character == "[" and self._depth):
            self._depth += 1
        elif character in "}]" and self._depth:
            self._depth -= 1
        elif character == '"' and self._depth:
            self._is_text = True
        else:
            raise ValueError("is no object")


@dataclass
class CallReader:
    """Takes an answer's text as it comes and tells apart what is said and what is called.

    Text that may be the beginning of a call is held back until it is known; what turns out to be no call is said, up to
    the mark where it would have ended. `thought_end` ends the thought that the prompt has begun; an answer that has to
    call begins with a call and has no thoughts. Takes time in proportion to the text.
    """

    calling: Calling
    thought_end: str | None = None
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._text, self._at = "", 0  # what was not looked at begins there
        self._said, self._body = list[str](), list[str]()  # of this piece of the answer; of the call that is written
        self._object, self._is_behind_call = JsonEnd(), False
        self._is_free = self.calling.demanded is None
        # A thought stands before what is said, behind a call or another thought: in a sentence its mark is a word.
        self._can_think = True
        begins = _BEGINS if self._is_free else (OPEN,)
        self._begins, self._begin = tuple(begins), re.compile("|".join(map(re.escape, begins)))
        self._step: Callable[[bool], bool] = self._outside
        if self._is_free and self.thought_end is not None:
            self._step = self._in_thought

    def feed(self, text: str, *, is_last: bool) -> tuple[str, list[Call]]:
        """What can be said and the calls that are whole now."""
        if not self._is_free and not self.calling.is_written:
            return self._demanded(text, is_last)
        self._text, self._at, self._said = self._text[self._at :] + text, 0, []
        num_before = len(self.calls)
        while self._step(is_last):
            pass
        return "".join(self._said), self.calls[num_before:]

    # A step reads on, and returns whether another one can: not where more of the answer is needed.

    def _outside(self, is_last: bool) -> bool:
        found, start = self._begin.search(self._text, self._at), self._at
        if found is None:
            self._say_what_is_no_mark(self._begins, is_last)
        else:
            self._say_to(found.start())
        self._can_think = self._can_think and not self._text[start : self._at].strip()
        if found is None:
            return False
        if found[0] == OPEN:
            self._at, self._body, self._object, self._step = found.end(), [], JsonEnd(), self._in_call
            return True
        self._say_to(found.end())
        if self._can_think:
            self.thought_end, self._step = _BEGINS[found[0]], self._in_thought
        return True

    def _in_thought(self, is_last: bool) -> bool:
        assert self.thought_end is not None
        self._can_think = True  # again, when this one is over
        return self._say_behind(self.thought_end, is_last)

    def _in_no_call(self, is_last: bool) -> bool:
        return self._say_behind(CLOSE, is_last)

    def _in_call(self, is_last: bool) -> bool:
        try:
            end = self._object.end_in(self._text, self._at)
            if end is None and is_last:
                raise ValueError("ends with the answer")
        except ValueError:  # what is not looked at again was looked at in vain: no mark is found twice
            if self._body:
                self._text, self._at = "".join(self._body) + self._text[self._at :], 0
            self._say(OPEN)
            self._can_think, self._step = False, self._in_no_call
            return True
        self._take_to(len(self._text) if end is None else end)
        if end is not None:
            self._step = self._behind_object
        return end is not None

    def _behind_object(self, is_last: bool) -> bool:
        found = _FIRST.search(self._text, self._at)
        self._take_to(len(self._text) if found is None else found.start())
        mark = self._text[self._at : self._at + len(CLOSE)]
        if not CLOSE.startswith(mark):
            self._say(OPEN + "".join(self._body))
            self._can_think, self._step = False, self._in_no_call
        elif mark == CLOSE or is_last:
            # No mark at the end of the answer: a stop string has taken its place, or the model left it out.
            self._end_call(mark)
        return self._step != self._behind_object

    def _end_call(self, mark: str) -> None:
        body = "".join(self._body)
        call = self.calling.written_call(body)
        self._at, self._step = self._at + len(mark), self._outside
        if call is None or len(self.calls) == MAX_CALLS:
            self._say(OPEN + body + mark)
            self._can_think = False
        else:
            self.calls.append(call)
            self._is_behind_call = self._can_think = True

    def _take_to(self, end: int) -> None:
        if end > self._at:
            self._body.append(self._text[self._at : end])
            self._at = end

    def _say_behind(self, mark: str, is_last: bool) -> bool:
        """Says all up to a mark and the mark itself, behind which calls are read again."""
        start = self._text.find(mark, self._at)
        if start < 0:
            return self._say_what_is_no_mark((mark,), is_last)
        self._say_to(start + len(mark))
        self._step = self._outside
        return True

    def _say_what_is_no_mark(self, marks: Sequence[str], is_last: bool) -> bool:
        """Says all but what may be the beginning of a mark."""
        num_held = 0
        if not is_last:
            longest = min(max(map(len, marks)) - 1, len(self._text) - self._at)
            ends = ((n, self._text[len(self._text) - n :]) for n in range(longest, 0, -1))
            num_held = next((n for n, end in ends if any(mark.startswith(end) for mark in marks)), 0)
        self._say_to(len(self._text) - num_held)
        return False

    def _say_to(self, end: int) -> None:
        self._say(self._text[self._at : end])
        self._at = end

    def _say(self, text: str) -> None:
        """Says a text without the line ends that templates write behind a call, which nobody says."""
        if self._is_behind_call:
            text = text.lstrip()
            self._is_behind_call = not text
        self._said.append(text)

    def _demanded(self, text: str, is_last: bool) -> tuple[str, list[Call]]:
        self._body.append(text)
        if not is_last:
            return "", []
        body, self._body = "".join(self._body), []
        made = list(self.calling.demanded_calls(body))
        self.calls += made
        return ("" if made else body), made
