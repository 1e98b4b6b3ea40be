"""Patterns that cannot be read: no reason to refuse where no grammar is made, and left out of the checks."""

from __future__ import annotations

import copy
import json
import time
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayswift.serving.api_errors import ApiError
from rayswift.serving.openai import ChatRequest, parse
from rayswift.serving.schema_costs import Room, is_unread
from rayswift.serving.schemas import ReadSchema

_EMAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"  # zod's
_NAMED = {"type": "function", "function": {"name": "f"}}
_FREE: tuple[dict[str, Any], ...] = ({}, {"tool_choice": "auto"}, {"tool_choice": "none"})
_HELD: tuple[dict[str, Any], ...] = ({"tool_choice": "required"}, {"tool_choice": _NAMED})


def _parsed(*schemas: dict[str, Any], **fields: Any) -> ChatRequest:
    names = ("f", *(f"f{number}" for number in range(1, len(schemas))))
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}}
             for name, schema in zip(names, schemas, strict=True)]  # fmt: skip
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": tools} | fields
    return parse(ChatRequest, json.dumps(body).encode())


def _admits(schema: dict[str, Any], value: Any) -> bool:
    return _parsed(schema).tools[0].function.admits(value, if_unknown=False)


@pytest.mark.parametrize("pattern", [_EMAIL, r"a(?<=b)", r"(a)\1", r"(?<n>a)\k<n>"])
def test_a_pattern_that_cannot_be_read_is_refused_only_where_a_grammar_is_made(pattern: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": pattern}}, "required": ["a"]}
    for fields in _FREE:
        request = _parsed(schema, **fields)
        assert request.tools[0].function.parameters == schema  # what the template sees
    function = _parsed(schema).tools[0].function
    assert function.admits({"a": "someone@example.org and much more than a few characters"}, if_unknown=False)
    assert not function.admits({"a": 1}, if_unknown=True)
    assert not function.admits({}, if_unknown=True)
    for fields in _HELD:
        with pytest.raises(ApiError, match="lookaround or a backreference") as refused:
            _parsed(schema, **fields)
        assert (refused.value.status, refused.value.param) == (400, "tools[0].function.parameters")


def test_a_response_format_needs_a_grammar_and_tools_beside_it_none() -> None:
    schema = {"type": "string", "pattern": _EMAIL}
    text = {"response_format": {"type": "text"}}
    _parsed(schema, **text)
    wanted = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}}
    _parsed(schema, tool_choice="none", **wanted)
    wanted["response_format"]["json_schema"]["schema"] = {"properties": {"a": schema}}
    with pytest.raises(ApiError, match="lookaround"):
        _parsed({}, tool_choice="none", **wanted)
    wanted["response_format"]["json_schema"]["schema"] = {"maxItems": 100_000}
    with pytest.raises(ApiError, match="items that"):
        _parsed({}, tool_choice="none", **wanted)


def test_many_tools_with_such_patterns_have_room_and_those_that_cost_are_bounded() -> None:
    _parsed(*({"properties": {"a": {"pattern": _EMAIL}, "b": {"pattern": rf"(?!{i})x"}}} for i in range(60)))
    with pytest.raises(ApiError, match="more than 256 patterns"):
        _parsed({"properties": {f"p{i}": {"pattern": rf"(?!{i})x"} for i in range(257)}})
    with pytest.raises(ApiError, match="characters of patterns"):
        _parsed({"pattern": "(?!a)" + "b" * 9000})


def test_lookaround_is_not_seen_where_it_is_none() -> None:
    for pattern in (r"[(?!)]", r"\(?=a", r"[\](?=]", r"\\d", r"(?:a)", r"(?<name>a)", r"[\1]", "a(?"):
        assert not is_unread(pattern), pattern
    for pattern in (r"(?=a)", r"[a](?!b)", r"\\(?<!b)", r"\[(?=]", r"(a)\\\1", r"a(?<=b)", r"[^](?=x)"):
        assert is_unread(pattern), pattern


_BAD = {"pattern": _EMAIL}


@pytest.mark.parametrize(
    ("schema", "admitted", "refused"),
    [
        ({"not": _BAD}, ["x"], []),
        ({"not": {"$ref": "#/$defs/e"}, "$defs": {"e": _BAD}, "type": "string"}, ["x"], [1]),
        ({"not": {"type": "number"}, "properties": {"a": _BAD}}, [{"a": "x"}], [1]),
        ({"oneOf": [{**_BAD, "type": "string"}, {"minLength": 1, "type": "string"}, {"type": "null"}]},
         ["x", "", None], [1]),
        ({"if": _BAD, "then": {"minLength": 5}, "else": {"maxLength": 3}}, ["x", "12345"], []),
        ({"patternProperties": {_EMAIL: {"type": "number"}, "^b": {"type": "string"}}, "additionalProperties": False},
         [{"x": "y", "b": "z"}], [{"b": 1}]),
        ({"contains": {**_BAD, "type": "string"}, "maxContains": 1}, [["a", "b"]], [[1]]),
        ({"properties": {"a": _BAD}, "unevaluatedProperties": False}, [{"a": "x"}], [{"b": 1}]),
        ({"properties": {"a": {"if": _BAD, "then": {"properties": {"c": {}}}}}, "unevaluatedProperties": False},
         [{"a": {"c": 1}}], []),
        ({"$defs": {"t": {"properties": {"t": {"$ref": "#/$defs/t"}, "e": {**_BAD, "type": "string"}}}},
          "$ref": "#/$defs/t"}, [{"t": {"t": {"e": "x"}}}], [{"t": {"t": {"e": 1}}}]),
        ({"properties": {"a": {"oneOf": [_BAD, {"type": "null"}]}, "b": {"$ref": "#/properties/a/oneOf/1"}}},
         [{"a": "x", "b": None}, {"b": 1}], []),  # a reference into what was moved: nothing of it is checked
        ({"properties": {"a": {"anyOf": [_BAD, {"type": "null"}]}, "b": {"$ref": "#/properties/a/anyOf/1"}}},
         [{"a": "x", "b": None}], [{"b": 1}]),
        ({"properties": {"pattern": {"const": _BAD}}}, [{"pattern": _BAD}], [{"pattern": {"pattern": "x"}}]),
    ],
)  # fmt: skip
def test_what_is_left_refuses_only_what_the_whole_refuses(
    schema: dict[str, Any], admitted: list[Any], refused: list[Any]
) -> None:
    before = copy.deepcopy(schema)
    assert [_admits(schema, value) for value in admitted] == [True] * len(admitted)
    assert [_admits(schema, value) for value in refused] == [False] * len(refused)
    assert schema == before


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nope"}, {"oneOf": [_BAD], "allOf": 5}, {"oneOf": 5, **_BAD}, {"allOf": 5, **_BAD}, {**_BAD, "not": 5},
        {"patternProperties": 5, **_BAD}, {"$ref": "http://x/y", **_BAD}, {"patternProperties": {_EMAIL: 5}, "type": 1},
        {"contains": [_BAD], "maxContains": 1}, {"pattern": "("}, {"pattern": r"\pL{99}"},
        {"properties": {"a": _BAD}, "required": "a"},
    ],
)  # fmt: skip
def test_what_is_no_schema_is_still_told(schema: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as refused:
        _parsed(schema)
    assert refused.value.status == 400


_LEAVES = st.sampled_from([
    {"pattern": "(?=a)a"}, {"pattern": "^(?=a)a", "type": "string"}, {"pattern": "b"}, {"type": "string"},
    {"type": "object"}, {"required": ["a"]}, {"$ref": "#/$defs/x"}, {"minItems": 1},
])  # fmt: skip
_SCHEMAS = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.fixed_dictionaries({"properties": st.fixed_dictionaries({"a": inner, "b": inner})},
                              optional={"unevaluatedProperties": st.just(False), "additionalProperties": inner}),
        st.fixed_dictionaries({"items": inner}), st.fixed_dictionaries({"contains": inner, "maxContains": st.just(1)}),
        *(st.fixed_dictionaries({key: st.tuples(inner, inner).map(list)}, optional={"allOf": inner.map(lambda x: [x]),
          "unevaluatedProperties": st.just(False)}) for key in ("oneOf", "anyOf")),
        st.fixed_dictionaries({"not": inner}), st.fixed_dictionaries({"if": inner, "then": inner, "else": inner}),
        st.fixed_dictionaries({"patternProperties": st.fixed_dictionaries({"(?=a)a": inner, "^b": inner}),
                               "additionalProperties": inner}),
        st.fixed_dictionaries({"propertyNames": inner}), st.fixed_dictionaries({"dependentSchemas":
          st.fixed_dictionaries({"a": inner})}),
    ),
    max_leaves=6,
)  # fmt: skip
_VALUES = st.recursive(
    st.sampled_from(["a", "b", "ab", "", 1, None]),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("abc"), inner)),
    max_leaves=6,
)


@given(_SCHEMAS, _LEAVES, _VALUES)
def test_whatever_the_whole_schema_admits_is_admitted(
    schema: dict[str, Any], shared: dict[str, Any], value: Any
) -> None:
    whole = {**schema, "$defs": {"x": shared}}
    read = ReadSchema(json.loads(json.dumps(whole)))
    try:
        read.check(Room(holds=False))
    except ValueError:  # a reference to itself
        return
    if jsonschema_rs.is_valid(whole, value, pattern_options=jsonschema_rs.FancyRegexOptions()):
        assert read.readable.admits(value)


def test_looking_for_lookaround_takes_time_in_proportion_to_the_pattern() -> None:
    begin = time.monotonic()
    for pattern in ("[" * 200_000, "(?" * 200_000, "\\" * 200_001, "[\\" * 100_000):
        assert not is_unread(pattern)
    assert time.monotonic() - begin < 1


def test_leaving_patterns_out_of_the_largest_schema_takes_no_time() -> None:
    many = {"properties": {f"p{i}": {"oneOf": [{"$ref": "#/$defs/e"}, {"type": "null"}]} for i in range(500)},
            "$defs": {"e": _BAD}}  # fmt: skip
    begin = time.monotonic()
    assert _admits(many, {"p1": "x"})
    assert time.monotonic() - begin < 1
