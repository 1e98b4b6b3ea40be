"""JSON Schemas that clients send: read within bounds, and values held to them at a cost that is known beforehand.

Knows schemas and the package that validates by them. Knows no request and no answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from operator import attrgetter
from typing import Any
from urllib.parse import quote, unquote

from rayswift.serving.schema_costs import (
    SHOWN_CHARS,
    AtOnce,
    Room,
    bits,
    num_patterns,
    num_read,
    take_all,
    weight,
)
from rayswift.serving.schema_readable import has_unread, leave_out_unread

MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH = 32 * 1024, 32
MAX_AT_ONCE = 4096
"""Schemas that one value is held to, with those that are combined and referred to."""
MAX_PATTERNS_AT_ONCE, MAX_BITS_AT_ONCE = 8, 13
"""Of what one value is held to together, which llguidance makes one automaton of: 20 patterns took 20 s, two multipleOf
of three digits 28 s. Of alternatives the largest counts."""
MAX_STEPS = 50_000
"""Looks from a schema to what a value is held to by it, for one value: about 50 ms."""
MAX_READ = 64 * 2**20
"""Characters that patterns read, times their compiled bytes, for one value. jsonschema_rs reads 0.4 GB in a second at
the worst, of (?:a?b?){1000}[cd]: 170 ms. Others take a thousandth of that, but which is seen only of plain ones."""
_UNEVALUATED = 4
"""How often, in effect, what is combined is looked at to know what it left: 2 times, which take longer."""
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_SAME = {"allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas", "dependencies", *_REFERENCES}
_EITHER = ("anyOf", "oneOf")
_MEMBERS = {"additionalProperties", "unevaluatedProperties", "patternProperties"}
_ITEMS = {"items", "prefixItems", "additionalItems", "unevaluatedItems", "contains"}
_NAMED = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"}
_DATA = {"enum", "const", "default", "examples"}
_Part = tuple[str, str, dict[str, Any]]
"""(keyword, name, schema): a schema in another; the name is that of a property or definition."""


class ReadSchema:
    """A schema of a client's, whose references are followed."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root, self._inside, self._known = root, dict[int, list[_Part]](), dict[int, AtOnce]()

    def check(self, room: Room) -> None:
        """Raises ValueError for a schema that is none, and for one that costs more than this server gives."""
        room.take("schemas", 0)  # where others have left none, this one is not even read
        if depth(self._root, MAX_SCHEMA_DEPTH) > MAX_SCHEMA_DEPTH:
            raise ValueError(f"must be at most {MAX_SCHEMA_DEPTH} levels deep")
        if len(json.dumps(self._root)) > MAX_SCHEMA_BYTES:
            raise ValueError(f"must be at most {MAX_SCHEMA_BYTES} bytes")
        compiled = set[str]()
        for node in self._nodes(room):
            if node is not self._root:
                self._check_part(node)
            take_all(node, room, compiled)
            found = self._at_once(node, MAX_SCHEMA_DEPTH, room)
            if found.num > MAX_AT_ONCE:
                raise ValueError(f"holds one value to more than {MAX_AT_ONCE} schemas at once, references followed")
            if not room.holds:
                continue
            if found.patterns > MAX_PATTERNS_AT_ONCE:
                raise ValueError(f"holds one value to more than {MAX_PATTERNS_AT_ONCE} patterns at once")
            if found.bits > MAX_BITS_AT_ONCE:
                raise ValueError(f"holds one number to multipleOf of more than {2**MAX_BITS_AT_ONCE} remainders")
            if found.bits:
                room.take("remainders of multipleOf", int(2**found.bits))
        try:
            _ = (self if room.holds else self.readable).validator
        except ValueError as error:
            raise ValueError(f"is no JSON Schema: {' '.join(str(error).split())}") from None

    def admits(self, value: Any, *, if_unknown: bool = False) -> bool:
        """Whether a value keeps to the schema; `if_unknown` where that would take more than MAX_STEPS or MAX_READ."""
        return bool(self.validator.is_valid(value)) if self._is_affordable(value) else if_unknown

    @cached_property
    def readable(self) -> ReadSchema:
        """This one without the patterns that cannot be read; itself where there are none. Its nodes were checked.

        Of a schema that refers to a place which is not there any more, nothing is left.
        """
        if not has_unread(self._nodes(Room(holds=False))):
            return self
        copied = ReadSchema(json.loads(json.dumps(self._root)))
        leave_out_unread(copied._nodes(Room(holds=False)), copied._parts)
        left = ReadSchema(copied._root)
        try:
            left._nodes(Room(holds=False))
        except ValueError:
            return ReadSchema({})
        return left

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
        raise ValueError(f"refers to {reference[:SHOWN_CHARS]}, which is not in it; write #/$defs/NAME")

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
                        raise ValueError(f"has {name} {anchor[:SHOWN_CHARS]} twice")
                    found[anchor] = node
        return found

    def _at_once(self, node: dict[str, Any], levels: int, room: Room) -> AtOnce:
        """What a value is held to because it is held to this one.

        Raises ValueError below `levels`, where one that refers to itself without going into the value ends, too.
        """
        known = self._known.get(id(node))
        if levels < (1 if known is None else known.levels):
            raise ValueError(f"combines or refers to schemas through more than {MAX_SCHEMA_DEPTH} levels for one value")
        if known is None:
            parts = [
                (keyword, self._at_once(inner, levels - 1, room))
                for keyword, _, inner in self._parts(node)
                if keyword in _SAME
            ]
            known = self._known[id(node)] = AtOnce(
                num=(weight(node) if room.holds else 1) + _times(node) * sum(one.num for _, one in parts),
                levels=1 + max((one.levels for _, one in parts), default=0),
                patterns=int(num_patterns(node) + _together(parts, "patterns")),
                bits=bits(node) + _together(parts, "bits"),
            )
        return known

    def _is_affordable(self, value: Any) -> bool:
        """Whether validating takes at most MAX_STEPS and MAX_READ, were every alternative tried."""
        left, unread, waiting = MAX_STEPS, MAX_READ, [(self._root, value)]
        while waiting and left >= 0:
            node, value = waiting.pop()
            if (unread := unread - num_read(node, value)) < 0:
                return False
            for keyword, name, inner in self._parts(node):
                held = _held(keyword, name, value)
                left -= 1 + len(held)
                if left < 0:
                    break
                waiting += [(inner, one) for one in held] * (_times(node) if keyword in _SAME else 1)
        return left >= 0


def moved(schema: dict[str, Any], place: str) -> dict[str, Any]:
    """A schema as it stands in another document, at a place written as a JSON pointer, its references turned there.

    It is one that was checked: its root alone has an $id or $schema, which go. Anchors are referred to by their place.
    """
    copied: dict[str, Any] = json.loads(json.dumps(schema))
    read = ReadSchema(copied)
    nodes, places = read._nodes(Room(holds=False)), {id(node): at for at, node in _placed(copied, place)}
    for node in nodes:
        for keyword in _REFERENCES:
            if isinstance(reference := node.get(keyword), str):
                fragment = reference.partition("#")[2]
                is_pointer = not fragment or unquote(fragment).startswith("/")
                node[keyword] = "#" + (place + fragment if is_pointer else places[id(read._anchors[unquote(fragment)])])
    for node in nodes:
        for name in ("$anchor", "$dynamicAnchor", *(("$id", "$schema") if node is copied else ())):
            node.pop(name, None)
    return copied


def _placed(value: Any, at: str) -> Iterator[tuple[str, Any]]:
    """(JSON pointer as a fragment has it, container) for a value and all in it."""
    if isinstance(value, dict | list):
        yield at, value
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _placed(one, f"{at}/{quote(str(key).replace('~', '~0').replace('/', '~1'), safe='~')}")


def _together(parts: Sequence[tuple[str, AtOnce]], what: str) -> float:
    """The sum over the parts of a schema, of alternatives the largest alone."""
    read = attrgetter(what)
    sums = sum(read(one) for keyword, one in parts if keyword not in _EITHER)
    return float(sums + sum(max((read(one) for at, one in parts if at == keyword), default=0) for keyword in _EITHER))


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
