"""A name is a module: `load("methods", "sft")` is the class that `rayswift/methods/sft.py` defines.

There is no registry to keep in step: the name means the same in every Ray process. Third parties add
modules through entry points of the group `rayswift.<family>` whose value is `package.module`.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from rayswift.errors import ConfigError


def names(family: str) -> list[str]:
    """The sorted names of a family (`methods`, `data.formats`, `serving.engines`, ...)."""
    package = importlib.import_module(f"rayswift.{family}")
    own = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    return sorted({*own, *(e.name for e in entry_points(group=f"rayswift.{family}"))})


def check_name(family: str, name: str, *, path: str = "name") -> None:
    """Raises ConfigError with a suggestion for a name nobody defines. Imports nothing that the name stands for."""
    known = names(family)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}"
        raise ConfigError(f"is not one of the {family}", path=path, value=name, fix=hint)


def load_module(family: str, name: str, *, path: str = "name") -> ModuleType:
    """The module behind a name. Errors as `check_name`."""
    check_name(family, name, path=path)
    for entry in entry_points(group=f"rayswift.{family}"):
        if entry.name == name:
            return importlib.import_module(entry.value)
    return importlib.import_module(f"rayswift.{family}.{name}")


def load(family: str, name: str, *, path: str = "name") -> Any:
    """The class a module is named after: `query_response` -> `QueryResponse`. Errors as `load_module`."""
    return getattr(load_module(family, name, path=path), class_name(name))


def class_name(name: str) -> str:
    """`query_response` -> `QueryResponse`."""
    return "".join(part.capitalize() for part in name.split("_"))
