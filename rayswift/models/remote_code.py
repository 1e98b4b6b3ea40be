"""Whether a model folder asks for code to be run that is not transformers' own. Such a folder is refused by name.

No loader of RaySwift trusts a folder's code, so what asks for it would fail, or be loaded as something else. What asks
for it in a nested config is refused even where transformers would not listen: other libraries have followed it there
without being told to trust it. Knows JSON files; imports transformers only for a folder that asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rayswift.errors import ConfigError
from rayswift.models.folder import parsed, read_json

_CONFIG = "config.json"
_CLASS_KEYS = (
    "tokenizer_class",
    "processor_class",
    "image_processor_type",
    "feature_extractor_type",
    "video_processor_type",
)


def check_code(folder: Path, *, field: str = "model.path") -> None:
    """Raises ConfigError with the file and the key by which a folder asks for code that is not transformers' own.

    An `auto_map` at the top of a file is no request where transformers has the model, or the class that the file names,
    itself: many models carry one from the time before it did, and transformers' own class is taken.
    """
    for file in sorted(folder.glob(f"*{_CONFIG}")):
        found = parsed(file, field=field)
        if not isinstance(found, dict):  # a list of the data sets it was trained on, say; no loader reads it
            continue
        for key, reason in _requests(found):
            if key == "auto_map" and _is_known(found, folder, field):
                continue
            raise ConfigError(
                f"asks in {file.name} ({key}) {reason}, which is never done",
                path=field,
                value=str(folder),
                fix=f"use a model that transformers has itself, or remove {key} if it does not need it",
            )


def _requests(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(`text_config.auto_map`, what is asked) for every key, at any depth, that names code."""
    left: list[tuple[str, Any]] = [("", config)]
    while left:
        place, value = left.pop()
        if isinstance(value, list):
            left += [(f"{place}[{number}]", one) for number, one in enumerate(value)]
        if not isinstance(value, Mapping):
            continue
        for key, one in value.items():
            path = f"{place}.{key}".removeprefix(".")
            if key == "auto_map" and one:
                yield path, "for code of the model's folder to be run"
            elif key == "trust_remote_code" and one:
                yield path, "for its own code to be trusted"
            elif key.endswith("_implementation") and _names_a_kernel(one):
                yield path, "for code from the hub to be run"
            elif isinstance(one, Mapping | list):
                left.append((path, one))


def _names_a_kernel(value: Any) -> bool:
    """Whether an implementation is a repository of the hub: transformers downloads it as a compiled kernel."""
    values = value.values() if isinstance(value, Mapping) else [value]
    return any(isinstance(one, str) and "/" in one for one in values)


def _is_known(found: Mapping[str, Any], folder: Path, field: str) -> bool:
    """Whether transformers itself has what a file with an `auto_map` describes."""
    from rayswift.models.auto import import_transformers

    import_transformers()
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    named = [str(found[key]) for key in _CLASS_KEYS if found.get(key)]
    if named:
        return all(hasattr(transformers, name) for name in named)
    return read_json(folder / _CONFIG, field=field).get("model_type") in CONFIG_MAPPING_NAMES
