"""JSON Schemas that clients send: read within bounds, and values held to them at a cost that is known beforehand.

Knows schemas and the package that validates by them. Knows no request and no answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any
from urllib.parse import unquote

MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH = 32 * 1024, 32
MAX_AT_ONCE = 4096
"""Schemas that one value is held to, with those that are combined and referred to."""
MAX_STEPS = 50_000
"""Looks from a schema to what a value is held to by it, for one value: about 50 ms."""
_LIMITS = {
    "schemas": 10_000,
    "patterns": 256,
    "characters of patterns": 8 * 1024,
    "character classes in patterns that ignore case": 12,  # 4 ms at each try: the case of a million characters
    "bytes of compiled patterns": 12 * 2**20,  # 7 ms a megabyte
    "items that minItems and maxItems count": 50_000,  # llguidance writes each one out, and knows no end
}
"""What all schemas of one request may have together."""
_PATTERN_BYTES = tuple(2**power for power in (13, 16, 20, 22))
"""Compiled sizes that a pattern is tried in. One letter of any script takes 85 kB, and as much for each repetition."""
_CHAR_BYTES = 2**12
"""Compiled pattern that one step reads a character with."""
_UNEVALUATED = 4
"""How often, in effect, what is combined is looked at to know what it left: 2 times, which take longer."""
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_SAME = {"allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas", "dependencies", *_REFERENCES}
_MEMBERS = {"additionalProperties", "unevaluatedProperties", "patternProperties"}
_ITEMS = {"items", "prefixItems", "additionalItems", "unevaluatedItems", "contains"}
_NAMED = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"}
_DATA = {"enum", "const", "default", "examples"}
_IGNORES_CASE, _CLASS = re.compile(r"\(\?[a-zA-Z-]*i"), re.compile(r"\[|\\[pP]")
_SHOWN_CHARS = 80
_Part = tuple[str, str, dict[str, Any]]
"""(keyword, name, schema): a schema in another; the name is that of a property or definition."""


class Room:
    """What is left of what the schemas of one request may have together."""

    def __init__(self) -> None:
        self._left = dict(_LIMITS)

    def take(self, what: str, amount: int) -> None:
        """Raises ValueError where less is left."""
        self._left[what] -= amount
        if self._left[what] < 0:
            raise ValueError(f"makes more than {_LIMITS[what]} {what} in one request; use fewer or smaller ones")


class ReadSchema:
    """A schema of a client's, whose references are followed."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root, self._inside, self._known = root, dict[int, list[_Part]](), dict[int, tuple[int, int]]()

    def check(self, room: Room) -> None:
        """Raises ValueError for a schema that is none, and for one that costs more than this server gives."""
        room.take("schemas", 0)  # where others have left none, this one is not even read
        if depth(self._root, MAX_SCHEMA_DEPTH) > MAX_SCHEMA_DEPTH:
            raise ValueError(f"must be at most {MAX_SCHEMA_DEPTH} levels deep")
        if len(json.dumps(self._root)) > MAX_SCHEMA_BYTES:
            raise ValueError(f"must be at most {MAX_SCHEMA_BYTES} bytes")
        for node in self._nodes(room):
            if node is not self._root:
                self._check_part(node)
            _take(node, room)
            if self._at_once(node, MAX_SCHEMA_DEPTH)[0] > MAX_AT_ONCE:
                raise ValueError(f"holds one value to more than {MAX_AT_ONCE} schemas at once, references followed")
        try:
            _ = self.validator
        except ValueError as error:
            raise ValueError(f"is no JSON Schema: {' '.join(str(error).split())}") from None

    def admits(self, value: Any) -> bool:
        """Whether a value keeps to the schema; False also where to know would take more than MAX_STEPS."""
        return self._is_affordable(value) and bool(self.validator.is_valid(value))

    @cached_property
    def validator(self) -> Any:
        """What validates. It fetches nothing, and its patterns take time in proportion to the text and their size."""
        import jsonschema_rs

        return jsonschema_rs.validator_for(self._root, pattern_options=jsonschema_rs.RegexOptions(), offline=True)

    def _nodes(self, room: Room) -> list[dict[str, Any]]:
        """Every schema in this one. Raises ValueError for too many, and for a reference to what is not there."""
        found, seen = [self._root], {id(self._root)}
        for node in found:
            room.take("schemas", 1)
            for _, _, inner in self._parts(node):
                if id(inner) not in seen:
                    seen.add(id(inner))
                    found.append(inner)
        return found

    def _check_part(self, node: dict[str, Any]) -> None:
        """Raises ValueError for a part that is a document of its own: what `#` means would depend on the place."""
        is_old = isinstance(node.get("id"), str) and "draft-04" in str(self._root.get("$schema"))
        if is_old or isinstance(node.get("$id"), str) or isinstance(node.get("$schema"), str):
            raise ValueError("has a schema with an $id or $schema of its own below its root; leave them out")

    def _parts(self, node: dict[str, Any]) -> list[_Part]:
        """The schemas right inside one, and those it refers to."""
        if (found := self._inside.get(id(node))) is None:
            found = self._inside[id(node)] = list(_inside(node))
            for keyword in _REFERENCES:
                if isinstance(reference := node.get(keyword), str):
                    found += ((keyword, "", target) for target in self._targets(reference))
        return found

    def _targets(self, reference: str) -> Sequence[dict[str, Any]]:
        base, _, fragment = reference.partition("#")
        fragment = unquote(fragment)
        value: Any = self._root
        if base in ("", str(self._root.get("$id", "")).partition("#")[0]):
            if fragment and not fragment.startswith("/"):
                value = self._anchors.get(fragment)
            for part in fragment.split("/")[1:]:
                value = _member(value, part.replace("~1", "/").replace("~0", "~"))
            if isinstance(value, dict | bool):
                return [value] if isinstance(value, dict) else ()
        raise ValueError(f"refers to {reference[:_SHOWN_CHARS]}, which is not in it; write #/$defs/NAME")

    @cached_property
    def _anchors(self) -> dict[str, Any]:
        found, waiting = dict[str, Any](), list[Any]([self._root])
        while waiting:
            node = waiting.pop()
            waiting += (
                one for one in (node.values() if isinstance(node, dict) else node) if isinstance(one, dict | list)
            )
            for name in ("$anchor", "$dynamicAnchor"):
                if isinstance(node, dict) and isinstance(anchor := node.get(name), str):
                    if anchor in found:
                        raise ValueError(f"has {name} {anchor[:_SHOWN_CHARS]} twice")
                    found[anchor] = node
        return found

    def _at_once(self, node: dict[str, Any], levels: int) -> tuple[int, int]:
        """(number, depth) of the schemas that a value is held to because it is held to this one.

        Raises ValueError below `levels`, where one that refers to itself without going into the value ends, too.
        """
        known = self._known.get(id(node))
        if levels < (1 if known is None else known[1]):
            raise ValueError(f"combines or refers to schemas through more than {MAX_SCHEMA_DEPTH} levels for one value")
        if known is None:
            found = [self._at_once(inner, levels - 1) for keyword, _, inner in self._parts(node) if keyword in _SAME]
            num = _weight(node) + _times(node) * sum(num for num, _ in found)
            known = self._known[id(node)] = (num, 1 + max((level for _, level in found), default=0))
        return known

    def _is_affordable(self, value: Any) -> bool:
        """Whether validating takes at most MAX_STEPS, were every alternative tried."""
        left, waiting = MAX_STEPS, [(self._root, value)]
        while waiting and left >= 0:
            node, value = waiting.pop()
            left -= _num_read(node, value) // _CHAR_BYTES
            for keyword, name, inner in self._parts(node):
                held = _held(keyword, name, value)
                left -= 1 + len(held)
                if left < 0:
                    break
                waiting += [(inner, one) for one in held] * (_times(node) if keyword in _SAME else 1)
        return left >= 0


def depth(value: Any, limit: int) -> int:
    """How deep objects and lists lie in each other; `limit` + 1 for anything deeper."""
    level, found = [value], 0
    while level := [inner for one in level for inner in _contents(one)]:
        found += 1
        if found > limit:
            return found
    return found


def _contents(value: Any) -> list[Any]:
    """A container as the list of what is in it; nothing for a plain value."""
    if isinstance(value, dict):
        return list(value.values()) or [None]
    return (value or [None]) if isinstance(value, list) else []


def _inside(node: dict[str, Any]) -> Iterator[_Part]:
    for keyword, value in node.items():
        if keyword in _DATA:
            continue
        named: Iterable[tuple[str, Any]] = [("", one) for one in (value if isinstance(value, list) else [value])]
        if keyword in _NAMED:
            named = value.items() if isinstance(value, dict) else ()
        yield from ((keyword, name, one) for name, one in named if isinstance(one, dict))


def _held(keyword: str, name: str, value: Any) -> Sequence[Any]:
    """What of a value is held to a schema that stands under a keyword."""
    if keyword in _SAME:
        return (value,)
    if isinstance(value, list):
        return value if keyword in _ITEMS else ()
    if not isinstance(value, dict):
        return ()
    if keyword == "properties":
        return (value[name],) if name in value else ()
    if keyword in _MEMBERS:
        return list(value.values())
    return list(value) if keyword == "propertyNames" else ()


def _member(value: Any, part: str) -> Any:
    if isinstance(value, dict):
        return value.get(part)
    return value[int(part)] if isinstance(value, list) and part.isdecimal() and int(part) < len(value) else None


def _times(node: dict[str, Any]) -> int:
    return _UNEVALUATED if "unevaluatedProperties" in node or "unevaluatedItems" in node else 1


def _num_items(node: dict[str, Any]) -> int:
    counts = [node[name] for name in ("minItems", "maxItems") if name in node]
    return sum(max(0, int(count)) for count in counts if isinstance(count, int | float))


def _weight(node: dict[str, Any]) -> int:
    """One, and more for a list whose items are counted: an engine writes each one out, wherever it is combined."""
    return 1 + _num_items(node) // 16


def _patterns(node: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """(pattern, whether it is for the names of properties)."""
    if isinstance(pattern := node.get("pattern"), str):
        yield pattern, False
    if isinstance(named := node.get("patternProperties"), dict):
        yield from ((pattern, True) for pattern in named)


def _num_read(node: dict[str, Any], value: Any) -> int:
    """Characters of a value that patterns read, times the bytes of each pattern: what that takes at the worst."""
    num = 0
    for pattern, is_for_names in _patterns(node):
        names = value if is_for_names and isinstance(value, dict) else ()
        texts = names if is_for_names else (value,) if isinstance(value, str) else ()
        if chars := sum(len(text) for text in texts):
            num += chars * next((size for size in _PATTERN_BYTES if _compiles(pattern, size)), _PATTERN_BYTES[-1])
    return num


def _take(node: dict[str, Any], room: Room) -> None:
    """Raises ValueError for counts and patterns for which there is no room."""
    if num_items := _num_items(node):
        room.take("items that minItems and maxItems count", num_items)
    for pattern, _ in _patterns(node):
        room.take("patterns", 1)
        room.take("characters of patterns", len(pattern))
        if _IGNORES_CASE.search(pattern):
            room.take("character classes in patterns that ignore case", len(_CLASS.findall(pattern)))
        for size in _PATTERN_BYTES:
            room.take("bytes of compiled patterns", size)  # before it is tried: what does not fit has cost as much
            if _compiles(pattern, size):
                break
        else:
            most = _PATTERN_BYTES[-1]
            raise ValueError(
                f"is no JSON Schema: has no pattern, or one of over {most} bytes, in {pattern[:_SHOWN_CHARS]}"
            )


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
