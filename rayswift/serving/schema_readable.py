"""A schema without what cannot be read here: patterns with lookaround or a backreference.

Where no grammar is made of a schema, such a pattern is no reason to refuse a request: the model is shown the schema as
it was sent, and its arguments are held to all of it but these patterns. What is left admits whatever the whole schema
admits, and more. Knows keywords of JSON Schema; how schemas refer to each other is known by `serving/schemas.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rayswift.serving.schema_costs import is_unread, patterns

_ANY_NAME = ""
"""The pattern of every name."""


def has_unread(nodes: Iterable[dict[str, Any]]) -> bool:
    """Whether any of these schemas has a pattern that cannot be read."""
    return any(is_unread(pattern) for node in nodes for pattern, _ in patterns(node))


def leave_out_unread(nodes: Sequence[dict[str, Any]], inside: Callable[[dict[str, Any]], Sequence[Any]]) -> None:
    """Take the patterns that cannot be read out of schemas, in place; `inside` are the parts of one, as `_Part`.

    And what would refuse more where a part of it admits more.
    """
    reaching = _reaching(nodes, inside)
    conditions = [node for node in nodes if id(node.get("if")) in reaching]
    for node in nodes:
        if isinstance(pattern := node.get("pattern"), str) and is_unread(pattern):
            del node["pattern"]
        if isinstance(named := node.get("patternProperties"), dict):
            node["patternProperties"] = _named(named)
        if id(node.get("not")) in reaching:
            del node["not"]
        if id(node.get("contains")) in reaching:
            node.pop("maxContains", None)
        if conditions:  # what they would have looked at is not known
            node.pop("unevaluatedProperties", None)
            node.pop("unevaluatedItems", None)
        either, others = node.get("oneOf"), node.get("allOf", [])
        if isinstance(either, list) and isinstance(others, list) and any(id(one) in reaching for one in either):
            del node["oneOf"]  # that no second one admits it is not known either
            node["allOf"] = [*others, {"anyOf": either}]
    for node in conditions:
        for keyword in ("if", "then", "else"):
            node.pop(keyword, None)


def _named(named: Mapping[str, Any]) -> dict[str, Any]:
    """Schemas by the pattern of their names. Those of a pattern that cannot be read may be of any name."""
    kept = {pattern: schema for pattern, schema in named.items() if not is_unread(pattern)}
    return kept if len(kept) == len(named) else {**kept, _ANY_NAME: True}


def _reaching(nodes: Sequence[dict[str, Any]], inside: Callable[[dict[str, Any]], Sequence[Any]]) -> set[int]:
    """The ids of the schemas that have such a pattern, or lead to one."""
    outside: dict[int, list[dict[str, Any]]] = {}
    for node in nodes:
        for _, _, inner in inside(node):
            outside.setdefault(id(inner), []).append(node)
    waiting = [node for node in nodes if has_unread([node])]
    found = {id(node) for node in waiting}
    while waiting:
        for node in outside.get(id(waiting.pop()), ()):
            if id(node) not in found:
                found.add(id(node))
                waiting.append(node)
    return found
