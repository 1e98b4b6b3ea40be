"""YAML as people mean it: `1e-4` is a number, `no` and `2024-01-01` are words, a key written twice is an error.

Knows where each value stands in the file. Knows nothing of jobs.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

import yaml
from yaml.reader import ReaderError

from rayswift.errors import ConfigError

_SCALARS = {
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", "~nN\0"),
    "tag:yaml.org,2002:merge": (r"<<", "<"),
}  # the core schema of YAML 1.2; PyYAML's default is 1.1, where 1e-4 is a word and 1:30 is 90


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012  (PyYAML copies the class attribute on write)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or the loader above would take for something else than a word."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        # An empty scalar is looked up under "", which add_implicit_resolver spells as the empty string.
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), [c.replace("\0", "") for c in _first])


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, 16) if text.lower().startswith("0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _int)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds Unicode's other line breaks into spaces unless they are escaped.
    style = '"' if any(c in text for c in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def parse(text: str, name: str) -> tuple[Any, dict[str, int]]:
    """The document and the 1-based line of every dotted key. Raises ConfigError naming file, line and column."""
    try:
        loader = _Loader(text)  # looks for control characters
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        rule = f"is not YAML in line {line}: it holds the control character U+{ord(text[error.position]):04X}"
        raise ConfigError(rule, path="file", value=name, fix="remove it, or write it escaped in quotes") from error
    try:
        node = loader.get_single_node()
        lines: dict[str, int] = {}
        if node is not None:
            _walk(node, "", lines, name, set())
        return (None if node is None else loader.construct_document(node)), lines
    except yaml.MarkedYAMLError as error:
        _refuse(error, name)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"is not YAML: {error}", path="file", value=name) from error
    finally:
        loader.dispose()


def value(text: str) -> Any:
    """One value as typed on a command line. What is no YAML (`*.jsonl`) is the text itself."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError):
        return text


def dump(document: Any) -> str:
    """YAML text that `parse` reads back as the same document."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _walk(node: yaml.Node, prefix: str, lines: dict[str, int], name: str, seen: set[int]) -> None:
    """Notes the line of every key below `node` and refuses duplicates. An aliased node is visited once."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, child in node.value:
            line, word = key.start_mark.line + 1, str(key.value)
            if word in first and word != "<<":
                fix = "keep one of the two"
                raise ConfigError(f"is written twice, in line {first[word]} and line {line} of {name}",
                                  path=prefix + word, fix=fix)  # fmt: skip
            first[word] = lines[prefix + word] = line
            _walk(child, f"{prefix}{word}.", lines, name, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            lines[f"{prefix}{index}"] = child.start_mark.line + 1
            _walk(child, f"{prefix}{index}.", lines, name, seen)


def _refuse(error: yaml.MarkedYAMLError, name: str) -> NoReturn:
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "an unknown place"
    rule = f"is not YAML in {place}: {error.problem or error.context}"
    fix = (
        "indent with spaces"
        if error.problem and r"'\t'" in error.problem
        else "check the quotes, colons and indentation there"
    )
    raise ConfigError(rule, path="file", value=name, fix=fix) from error
