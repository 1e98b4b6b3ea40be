"""pydantic's complaints as sentences: path, value, rule, fix, and where the value was written.

Knows the error types of pydantic and the fields of a job; knows no files.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from rayswift.config import keys
from rayswift.config.job import Job
from rayswift.errors import ConfigError

_RULES = {
    "bool_parsing": "is not true or false",
    "bool_type": "is not true or false",
    "dict_type": "is not a mapping of keys to values",
    "finite_number": "is not a finite number",
    "float_parsing": "is not a number",
    "float_type": "is not a number",
    "greater_than": "is not greater than {gt}",
    "greater_than_equal": "is less than {ge}",
    "int_from_float": "is not a whole number",
    "int_parsing": "is not a whole number",
    "int_parsing_size": "is too large",
    "int_type": "is not a whole number",
    "less_than": "is not less than {lt}",
    "less_than_equal": "is greater than {le}",
    "list_type": "is not a list",
    "literal_error": "is not one of {expected}",
    "missing": "is missing",
    "model_attributes_type": "is not a section of keys and values",
    "model_type": "is not a section of keys and values",
    "string_pattern_mismatch": "does not match {pattern}",
    "string_type": "is not text",
    "too_long": "has too many entries (at most {max_length})",
    "too_short": "has too few entries (at least {min_length})",
    "tuple_type": "is not a list",
}


def explain(
    error: ValidationError, origins: Mapping[str, str], *, model: type[BaseModel] = Job, root: str = ""
) -> list[ConfigError]:
    """One ConfigError per wrong value, in the order of the keys. `root` is put before every path."""
    grouped: dict[tuple[str | int, ...], list[ErrorDetails]] = {}
    found = error.errors(include_url=False)
    for details in found:
        if details["type"] == "too_short" and _is_above(details["loc"], found):
            continue  # pydantic does not count an entry that is wrong
        loc = details["loc"] if details["type"] == "extra_forbidden" else _field_loc(details["loc"], model)
        grouped.setdefault(loc, []).append(details)
    return [_sentence(loc, group, origins, model, root) for loc, group in grouped.items()]


def together(problems: list[ConfigError], source: str) -> ConfigError:
    """One error that lists all problems, so that a file is mended in one go."""
    if len(problems) == 1:
        return problems[0]
    return ConfigError("\n  ".join([f"{source} has {len(problems)} problems:", *map(str, problems)]))


def _is_above(loc: tuple[str | int, ...], found: list[ErrorDetails]) -> bool:
    """Whether something below `loc` is wrong."""
    return any(len(other["loc"]) > len(loc) and other["loc"][: len(loc)] == loc for other in found)


def _field_loc(loc: tuple[str | int, ...], model: type[BaseModel]) -> tuple[str | int, ...]:
    """The part of a location that names fields and list entries; pydantic appends the tags of unions."""
    for end in range(len(loc), 0, -1):
        if keys.field_at(loc[:end], model) is not None:
            return loc[:end]
    return loc


def _sentence(
    loc: tuple[str | int, ...],
    found: list[ErrorDetails],
    origins: Mapping[str, str],
    model: type[BaseModel],
    root: str,
) -> ConfigError:
    path, first = root + ".".join(map(str, loc)), found[0]
    if first["type"] == "value_error":
        text = str(first.get("ctx", {}).get("error", first["msg"]))
        return ConfigError(text, path=path or None)
    where = _where(path, origins)
    if first["type"] == "extra_forbidden":
        return ConfigError("is not a key of a job" if not root else f"is not an option of the {root.rstrip('.')}",
                           path=path, fix=keys.suggestion(loc, model, root=root) + where)  # fmt: skip
    rule = " and ".join(dict.fromkeys(_rule(details) for details in found))
    fix = _fix(loc, first, model) + where
    if first["type"] == "missing":
        return ConfigError(rule, path=path, fix=fix)
    return ConfigError(rule, path=path, value=first["input"], fix=fix)


def _rule(details: ErrorDetails) -> str:
    template = _RULES.get(details["type"])
    if template is None:
        return f"is wrong: {details['msg']}"
    return template.format(**{"expected": "", **details.get("ctx", {})}).replace("'", "").replace(" or ", " or ")


def _where(path: str, origins: Mapping[str, str]) -> str:
    """` (job.yaml line 7)` for the closest enclosing key that was written somewhere."""
    while path:
        if path in origins:
            return f" ({origins[path]})"
        path = path.rpartition(".")[0]
    return ""


def _fix(loc: tuple[str | int, ...], details: ErrorDetails, model: type[BaseModel]) -> str:
    """What to write instead: the closest word, the shape wanted, or the default and what the key means."""
    field, path = keys.field_at(loc, model), ".".join(map(str, loc))
    if details["type"] == "literal_error":
        words = [word.strip(" '") for word in details["ctx"]["expected"].replace(" or ", ",").split(",")]
        close = difflib.get_close_matches(str(details["input"]), words, n=1)
        return f"did you mean {close[0]}?" if close else f"write one of {', '.join(words)}"
    if details["type"] in ("tuple_type", "list_type", "too_short") and keys.level(loc, model) is not None:
        return f"write {path}: [{{path: FILE}}], or {path}.0.path=FILE on the command line"
    if details["type"] in ("tuple_type", "list_type"):
        return f"write {path}=[{details['input']}]"
    if details["type"] in ("model_type", "model_attributes_type"):
        below = keys.level(loc, model)
        names = ", ".join(list(below.model_fields)[:6]) if below else ""
        return f"write keys below it ({names}, ...)"
    if field is None:
        return "correct it"
    meaning = (field.description or "").split("\n")[0].rstrip(".")
    if details["type"] == "string_type":
        return f"put it in quotes if it is text: {meaning or 'text'}"
    example = _example(field.default)
    return f"use a value such as {example}: {meaning[:1].lower()}{meaning[1:]}" if example else f"it is: {meaning}"


def _example(default: Any) -> str:
    return "" if default is PydanticUndefined or default is None or isinstance(default, BaseModel) else str(default)
