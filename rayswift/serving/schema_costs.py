"""What one schema of a client's costs by itself, and the room that all schemas of a request share.

Knows keywords of JSON Schema and the package that compiles patterns. Does not know how schemas are combined.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from decimal import Decimal
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

_LIMITS = {
    "schemas": 10_000,
    "patterns": 256,
    "characters of patterns": 8 * 1024,
    "character classes in patterns that ignore case": 12,  # 4 ms at each try: the case of a million characters
    "bytes of compiled patterns": 16 * 2**20,  # 7 ms a megabyte, twice: smaller sizes are tried before
    "items that minItems and maxItems count": 50_000,  # llguidance writes each one out, and knows no end
    "remainders of multipleOf": 20_000,  # it has a state for each
}
"""What all schemas of one request may have together."""
_OF_GRAMMARS = ("items that minItems and maxItems count", "remainders of multipleOf")
_PATTERN_BYTES = tuple(2**power for power in (11, 14, 17, 19, 20, 22))
"""Compiled sizes that a pattern is tried in. One letter of any script takes 85 kB, and as much for each repetition."""
_PLAIN_BYTES = 8
"""What each character of a plain pattern counts when it reads. The worst found takes 25 ns a character of a text for
it, 2 kB of [^x]*[^a][^x][^x] and so on; others a hundredth of that."""
_ESCAPE = r"\\(?:[dDwWsSnrtfv\W]|[pP](?:[A-Z]|\{\w+\})|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})"
_ATOM = rf"(?:[^\\\[\](){{}}|*+?^$]|{_ESCAPE}|\[\^?(?:[^\\\[\]&~-]|{_ESCAPE}|-(?!-))+\])"
_PLAIN = re.compile(rf"\^?{_ATOM}*(?:{_ATOM}[*+?]{_ATOM}*)?\$?|\^{_ATOM}*(?:{_ATOM}\{{\d+(?:,\d*)?\}}{_ATOM}*)?\$?")
"""Patterns of one repetition at most, and counted only from the begin: however large, few of its states are alive."""
_UNREAD = re.compile(r"(\(\?<?[=!]|\\(?:[1-9]|k<))|\\.|\[(?:[^\]\\]|\\.)*\]?", re.DOTALL)
"""What a pattern may have elsewhere and not here, where it takes time in proportion to the text: the group, which is
neither escaped nor in a class of characters."""
_IGNORES_CASE, _CLASS = re.compile(r"\(\?[a-zA-Z-]*i"), re.compile(r"\[|\\[pP]")
SHOWN_CHARS = 80


class Room:
    """What is left of what the schemas of one request may have together.

    `holds`: whether a grammar is made of them, which holds the answer to them; some of them cost nothing without one,
    and what cannot be read of them is left out of what answers are checked by.
    """

    def __init__(self, *, holds: bool = True) -> None:
        self.holds, self._left, self._patterns = holds, dict(_LIMITS), set[str]()

    def for_grammar(self) -> Room:
        """The same room, for a schema that a grammar is made of whatever becomes of the others."""
        other = Room()
        other._left, other._patterns = self._left, self._patterns
        return other

    def take(self, what: str, amount: int) -> None:
        """Raises ValueError where less is left."""
        if what in _OF_GRAMMARS and not self.holds:
            return
        self._left[what] -= amount
        if self._left[what] < 0:
            raise ValueError(f"makes more than {_LIMITS[what]} {what} in one request; use fewer or smaller ones")

    def take_pattern(self, pattern: str) -> None:
        """Raises ValueError where there is no room for it. It is read once for all schemas."""
        if pattern not in self._patterns:
            self._patterns.add(pattern)
            self.take("patterns", 1)
            self.take("characters of patterns", len(pattern))


class AtOnce(NamedTuple):
    """What one value is held to because it is held to a schema, with all that is combined or referred to."""

    num: int
    """Schemas, counted by what they cost."""
    levels: int
    """Of schemas that refer to or combine others."""
    patterns: int
    bits: float
    """log2 of the remainders of all multipleOf together."""


def num_items_of(node: dict[str, Any]) -> int:
    """Items that a schema of a list counts."""
    counts = [node[name] for name in ("minItems", "maxItems") if name in node]
    return sum(int(min(max(0, count), 2**53)) for count in counts if isinstance(count, int | float))


def num_patterns(node: dict[str, Any]) -> int:
    """Patterns that a text is held to."""
    return int(isinstance(node.get("pattern"), str))


def bits(node: dict[str, Any]) -> float:
    """log2 of the remainders that multipleOf tells apart: of its digits, without the zeros at either end."""
    value = node.get("multipleOf")
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        return 0
    digits = Decimal(str(value) if isinstance(value, float) else value).normalize().as_tuple().digits
    return math.log2(int("".join(map(str, digits)))) if len(digits) < 18 else math.inf


def weight(node: dict[str, Any]) -> int:
    """One, and more for a list whose items are counted: an engine writes each one out, wherever it is combined."""
    return 1 + num_items_of(node) // 16


def patterns(node: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """(pattern, whether it is for the names of properties)."""
    if isinstance(pattern := node.get("pattern"), str):
        yield pattern, False
    if isinstance(named := node.get("patternProperties"), dict):
        yield from ((pattern, True) for pattern in named)


def num_read(node: dict[str, Any], value: Any) -> int:
    """Characters of a value that patterns read, times the bytes of each pattern that may be alive at one of them."""
    num = 0
    for pattern, is_for_names in patterns(node):
        names = value if is_for_names and isinstance(value, dict) else ()
        texts = names if is_for_names else (value,) if isinstance(value, str) else ()
        if chars := sum(len(text) for text in texts):
            num += chars * _bytes_read(pattern)
    return num


def take_all(node: dict[str, Any], room: Room, compiled: set[str]) -> None:
    """Raises ValueError for counts and patterns for which there is no room.

    Lookaround counts as a pattern, and is refused where a grammar is made of it. `compiled` are the patterns of the
    same root so far: what validates by it compiles each once.
    """
    if num_items := num_items_of(node):
        room.take("items that minItems and maxItems count", num_items)
    for pattern in dict.fromkeys(pattern for pattern, _ in patterns(node) if pattern not in compiled):
        compiled.add(pattern)
        room.take_pattern(pattern)
        if is_unread(pattern) and not room.holds:
            continue
        if _IGNORES_CASE.search(pattern):
            room.take("character classes in patterns that ignore case", len(_CLASS.findall(pattern)))
        for smaller, size in pairwise((0, *_PATTERN_BYTES)):
            # before it is tried: what does not fit has cost as much
            room.take("bytes of compiled patterns", size - smaller)
            if _compiles(pattern, size):
                break
        else:
            raise ValueError(_refusal(pattern))


def _refusal(pattern: str) -> str:
    if is_unread(pattern):
        what = "has a pattern with lookaround or a backreference, which are not supported; leave it out: "
        return what + pattern[:SHOWN_CHARS]
    return f"is no JSON Schema: has no pattern, or one of over {_PATTERN_BYTES[-1]} bytes, in {pattern[:SHOWN_CHARS]}"


@lru_cache(maxsize=4096)
def is_unread(pattern: str) -> bool:
    """Whether a pattern has lookaround or a backreference, by the rules of ECMA 262."""
    return any(found[1] is not None for found in _UNREAD.finditer(pattern))


@lru_cache(maxsize=4096)
def _bytes_read(pattern: str) -> int:
    if _PLAIN.fullmatch(pattern):
        return _PLAIN_BYTES * len(pattern)
    return next((size for size in _PATTERN_BYTES if _compiles(pattern, size)), _PATTERN_BYTES[-1])


@lru_cache(maxsize=4096)
def _compiles(pattern: str, max_bytes: int) -> bool:
    """Whether a pattern is one, and small enough. Requests bring the same ones again and again."""
    import jsonschema_rs

    options = jsonschema_rs.RegexOptions(size_limit=max_bytes)
    try:
        jsonschema_rs.validator_for({"pattern": pattern}, pattern_options=options, offline=True)
    except ValueError:
        return False
    return True
