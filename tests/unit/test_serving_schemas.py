"""Schemas of clients: ordinary ones pass, what they may cost is bounded, and calls are held to them as before."""

from __future__ import annotations

import json
import time
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayswift.serving import schemas
from rayswift.serving.api_errors import ApiError
from rayswift.serving.openai import ChatRequest, parse
from rayswift.serving.schema_costs import _PLAIN, Room
from rayswift.serving.schemas import ReadSchema

_PATTERNS = (
    r"^[a-zA-Z0-9._%+-]+@[a-zA-Z0-9.-]+\.[a-zA-Z]{2,}$", r"^\d{4}-\d{2}-\d{2}$", r"^\+?[1-9]\d{1,14}$",
    r"^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$",
)  # fmt: skip
_UUID = (
    "^([0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[1-8][0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}|"
    "00000000-0000-0000-0000-000000000000|ffffffff-ffff-ffff-ffff-ffffffffffff)$"
)  # zod's
_TREE = {
    "$defs": {"node": {"type": "object", "properties": {"left": {"$ref": "#/$defs/node"},
                                                        "right": {"$ref": "#/$defs/node"}}}},
    "$ref": "#/$defs/node",
}  # fmt: skip


def _operation(name: str) -> dict[str, Any]:
    sides = {side: {"$ref": "#/$defs/term"} for side in ("left", "right")}
    return {"type": "object", "properties": {**sides, "op": {"const": name}}, "required": ["op", "left", "right"]}


_TERM = {
    "$defs": {
        "term": {"anyOf": [{"$ref": "#/$defs/add"}, {"$ref": "#/$defs/sub"}, {"type": "number"}]},
        "add": _operation("add"),
        "sub": _operation("sub"),
    },
    "$ref": "#/$defs/term",
}
_TWICE = {
    "$defs": {"t": {"type": "object", "properties": {"c": {"allOf": [{"$ref": "#/$defs/t"}] * 2}}}},
    "$ref": "#/$defs/t",
}


def _checked(schema: dict[str, Any]) -> ReadSchema:
    read = ReadSchema(json.loads(json.dumps(schema)))
    read.check(Room())
    return read


def _inside(depth: int) -> dict[str, Any]:
    return {"c": _inside(depth - 1)} if depth else {}


def test_the_tools_of_an_ordinary_request_have_room() -> None:
    properties = {f"p{i}": {"type": "string", "pattern": pattern} for i, pattern in enumerate(_PATTERNS)}
    others = {f"q{i}": {"type": ["string", "null"], "maxLength": 100, "enum": ["a", "b"]} for i in range(30)}
    room = Room()
    for _ in range(36):
        ReadSchema({"type": "object", "properties": {**properties, **others}}).check(room)


def test_a_pattern_counts_once_in_a_request_and_its_size_once_in_a_schema() -> None:
    room = Room()
    for _ in range(30):
        ReadSchema({"properties": {f"p{i}": {"pattern": _UUID} for i in range(100)}}).check(room)
    _checked({"properties": {f"p{i}": {"pattern": rf"^.{{1,{200 + i}}}$"} for i in range(24)}})
    large = ReadSchema({"pattern": r"\pL{40}"})
    for _ in range(3):
        large.check(room)
    with pytest.raises(ValueError, match="bytes of compiled patterns"):
        large.check(room)


@pytest.mark.parametrize(
    "schema",
    [
        {"maxItems": 100_000}, {"multipleOf": 999_983}, {"allOf": [{"pattern": f"^.*a.{{{i}}}$"} for i in range(9)]},
        {"properties": {f"p{i}": {"type": "array", "maxItems": 1000} for i in range(51)}},
    ],
)  # fmt: skip
def test_what_only_a_grammar_would_pay_for_counts_only_where_one_is_made(schema: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": [tool]}
    for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": "none"}):
        parse(ChatRequest, json.dumps(body | choice).encode())
    for choice in ({"tool_choice": "required"}, {"tool_choice": {"type": "function", "function": {"name": "f"}}}):
        with pytest.raises(ApiError, match=r"items that|at once|remainders"):
            parse(ChatRequest, json.dumps(body | choice).encode())


@pytest.mark.parametrize(
    "schema",
    [
        _TREE, _TERM, {"pattern": r"^[\p{L} '-]{1,50}$"}, {"pattern": "^.{1,1000}$"},
        {"pattern": "(?i)^(yes|no)[.!]?$"},
        {"$id": "https://example.org/s", "$ref": "https://example.org/s#/$defs/a", "$defs": {"a": {}}},
        {"$defs": {"a b/c": {"$anchor": "here"}}, "allOf": [{"$ref": "#here"}, {"$ref": "#/$defs/a%20b~1c"}]},
        {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"type": "string"}, {"$ref": "#/items/0"}]},
        {"const": {"$ref": "#/nowhere", "$id": "x", "pattern": "("}}, {"maxItems": 1000, "items": {"minItems": 2}},
        {"anyOf": [{"pattern": f"^{letter}"} for letter in "abcdefghijklmnop"]}, {"multipleOf": 0.01},
        {"allOf": [{"multipleOf": 86_400}, {"anyOf": [{"multipleOf": 7}, {"multipleOf": 0.5}]}]},
        {"properties": {"pattern": {"type": "string"}, "$id": {}, "$ref": {}, "maxItems": {}, "enum": {}}},
    ],
)  # fmt: skip
def test_an_ordinary_schema_passes(schema: dict[str, Any]) -> None:
    _checked(schema)


def test_what_stands_where_only_a_reference_leads_counts() -> None:
    hidden = {"$ref": "#/default/hidden", "default": {"hidden": {"pattern": r"\pL{99}"}}}
    with pytest.raises(ValueError, match="over 4194304 bytes"):
        _checked(hidden)
    named = {"properties": {"enum": {"pattern": r"\pL{99}"}, "default": {"maxItems": 10**6}}}
    with pytest.raises(ValueError, match=r"4194304 bytes|items that"):
        _checked(named)


@pytest.mark.parametrize("pattern", [r"^(?!\.)a", r"a(?<=b)", r"(a)\1", r"(?<n>a)\k<n>"])
def test_a_pattern_that_cannot_be_read_in_bounded_time_is_named_as_that(pattern: str) -> None:
    with pytest.raises(ValueError, match="lookaround or a backreference, which are not supported"):
        _checked({"pattern": pattern})
    with pytest.raises(ValueError, match="has no pattern"):
        _checked({"pattern": "("})


def test_a_room_that_is_full_lets_nothing_more_be_read() -> None:
    room, read = Room(), ReadSchema({"allOf": [{} for _ in range(4000)]})
    for _ in range(2):
        read.check(room)
    for schema in (read, ReadSchema({})):
        with pytest.raises(ValueError, match="more than 10000 schemas in one request"):
            schema.check(room)


def test_recursive_values_are_held_to_recursive_schemas() -> None:
    tree = _checked(_TREE)
    assert tree.admits({"left": {"right": {}}, "right": {"left": {}}})
    assert not tree.admits({"left": {"right": 5}})
    deep: dict[str, Any] = {}
    for _ in range(150):
        deep = {"left": deep}
    assert tree.admits(deep)
    term, one = _checked(_TERM), {"op": "sub", "left": 1, "right": 2}
    assert term.admits({"op": "add", "left": {**one, "left": one}, "right": {"op": "sub", "left": one, "right": one}})
    assert not term.admits({**one, "right": {**one, "op": "mul"}})


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (_TWICE, _inside(150)),  # doubles with every level of the value
        ({"items": {"allOf": [{} for _ in range(4000)]}}, [1] * 10_000),
        ({"patternProperties": {"a": {}, "[ab]*a[ab]{9000}c": {}}}, {"ab" * 5000: 1}),
        ({"pattern": "[ab]*a[ab]{9000}c"}, "ab" * 5000), ({"pattern": "(?:a?b?){1000}[cd]"}, "ab" * 2500),
    ],
)  # fmt: skip
def test_what_would_take_long_to_know_is_not_admitted(schema: dict[str, Any], value: Any) -> None:
    read = _checked(schema)
    read.admits(0)
    assert min(_seconds(read, value) for _ in range(3)) < 0.5


@pytest.mark.parametrize(
    ("pattern", "text", "other"),
    [
        (r"\S", " " * 250_000 + "x", " "), (r"^[\s\S]{1,1000}$", "é" * 1000, ""), ("^.+$", "a" * 250_000, ""),
        ("^.{1,255}$", "a" * 255, "a" * 100_000), (r"^[\p{L} .,'-]{1,30}$", "é" * 30, "/"),
        (r"^(?:.|\n)*$", "a\n" * 10_000, 1), (_PATTERNS[0], "a" * 1000 + "@example.org", "a" * 20_000),
    ],
)  # fmt: skip
def test_ordinary_patterns_are_read_however_large_they_are_compiled(pattern: str, text: str, other: Any) -> None:
    read = _checked({"type": "object", "additionalProperties": {"type": "string", "pattern": pattern}})
    begin = time.monotonic()
    assert read.admits({"a": text})
    assert not read.admits({"a": text[:1], "b": other}, if_unknown=True)  # it is known
    assert time.monotonic() - begin < 1


def test_two_short_texts_of_a_large_pattern_are_read() -> None:
    text = {"type": "string", "pattern": "^.{1,255}$"}
    assert _checked({"properties": {"a": text, "b": text}}).admits({"a": "x" * 100, "b": "y" * 96})


def test_a_plain_pattern_is_of_one_repetition_and_counted_from_the_begin() -> None:
    plain = ("^.{1,999}$", r"\S", "^[a-z]{3}", r"[^<>]+$", r"^\$[\w-]{0,9}\.txt", "a?b", r"^[\p{L}\x20\u00c0]{9}")
    others = ("[ab]{1,9}", "^.{1,99}.{1,99}$", "a?b?", "^a{3}{3}$", "a|b", "(a)", r"^\x{41}{9}", "[a&&b]")
    assert [pattern for pattern in (*plain, *others) if _PLAIN.fullmatch(pattern)] == list(plain)


def _seconds(read: ReadSchema, value: Any) -> float:
    begin = time.monotonic()
    assert not read.admits(value)
    return time.monotonic() - begin


def test_each_way_to_combine_schemas_for_one_value_counts() -> None:
    for keyword in ("allOf", "anyOf", "oneOf"):
        assert _double(lambda inner, keyword=keyword: {keyword: [inner, inner]}) == 2
    assert _double(lambda inner: {"not": inner}) == 1
    assert _double(lambda inner: {"if": inner, "then": inner, "else": inner}) == 3
    assert _double(lambda inner: {"dependentSchemas": {"a": inner, "b": inner}}) == 2
    assert _double(lambda inner: {"properties": {"a": inner, "b": inner}}) == 0


def _double(combined: Any) -> int:
    read = ReadSchema(combined({"type": "object"}))
    return read._at_once(read._root, schemas.MAX_SCHEMA_DEPTH, Room())[0] - 1


_LEAVES = st.sampled_from([{"type": "string"}, {"type": "object"}, {"required": ["a"]}, {"$ref": "#"}, {"minItems": 1}])
_SCHEMAS = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.fixed_dictionaries({"properties": st.fixed_dictionaries({"a": inner, "b": inner})}),
        st.fixed_dictionaries({"items": inner}), st.fixed_dictionaries({"allOf": st.tuples(inner, inner).map(list)}),
        st.fixed_dictionaries({"anyOf": st.tuples(inner, inner).map(list)}), st.fixed_dictionaries({"not": inner}),
        st.fixed_dictionaries({"patternProperties": st.fixed_dictionaries({"^a": inner})}),
    ),
    max_leaves=6,
)  # fmt: skip
_VALUES = st.recursive(
    st.sampled_from(["x", 1, None]),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("ab"), inner)),
    max_leaves=6,
)


@given(_SCHEMAS, _VALUES)
def test_what_is_admitted_is_what_the_package_calls_valid(schema: dict[str, Any], value: Any) -> None:
    try:
        read = _checked(schema)
    except ValueError:  # a reference to itself
        return
    assert read.admits(value) == jsonschema_rs.is_valid(schema, value)
