"""How the states of a text's tokens become one vector: what a sentence-transformers folder says of it, in JSON files.

A folder whose `modules.json` ends in a pooling is that of an embedding model, whatever its architecture generates
otherwise. Knows no tensor; loads neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rayswift.errors import ConfigError
from rayswift.models.folder import parsed, read_json
from rayswift.models.loading import local_folder

Mode = Literal["cls", "mean", "last"]
_MODULES, _SETTINGS = "modules.json", "sentence_bert_config.json"
_MODES: Mapping[str, Mode] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_OLD_KEYS = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "lasttoken", "max_tokens": "max",
             "mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "weightedmean_tokens": "weightedmean"}  # fmt: skip
"""Of a pooling's `pooling_mode_*` switches, the name that newer folders have for the same."""


@dataclass(frozen=True)
class Pooling:
    """Which states are taken: the first token's (`cls`), the last one's, or the mean over all.

    Vectors have length 1 where `normalize` says so.
    """

    mode: Mode
    normalize: bool
    max_tokens: int | None = None
    """Of a text, its special tokens included; None leaves it to the model."""
    is_matryoshka: bool = False
    """Whether the first numbers of a vector are a vector, too."""
    dimensions: tuple[int, ...] = ()
    """How many numbers a cut vector may have; none named are all up to the whole one's."""


def read_pooling(path: str, *, field: str = "model.path") -> Pooling | None:
    """The pooling of a folder or hub id; None for a model that makes no embeddings.

    Raises ConfigError for a way to make them that is not served, such as a dense layer behind the pooling.
    """
    folder = local_folder(path, weights=False, field=field)
    modules = _modules(folder, field)
    pooling = next((place for name, place in modules if name == "Pooling"), None)
    if pooling is None:
        return None
    _check(modules, folder, field)
    settings = read_json(folder / _SETTINGS, field=field) if (folder / _SETTINGS).is_file() else {}
    if settings.get("do_lower_case"):
        raise _refusal("lower-cases texts before its tokenizer", folder / _SETTINGS, "let the tokenizer do it", field)
    config = read_json(folder / "config.json", field=field)
    dimensions = config.get("matryoshka_dimensions") or ()
    return Pooling(
        _mode(folder / pooling / "config.json", field),
        normalize=modules[-1][0] == "Normalize",
        max_tokens=settings.get("max_seq_length"),
        is_matryoshka=bool(config.get("is_matryoshka") or dimensions),
        dimensions=tuple(sorted(dimensions)),
    )


def module_folders(folder: Path) -> list[str]:
    """The folders of what stands behind the model, below its own, in order."""
    return [place for _, place in _modules(folder, "model.path") if place]


def _modules(folder: Path, field: str) -> list[tuple[str, str]]:
    """(class, folder below `folder`) of each module in order; none where the folder is not sentence-transformers'."""
    file = folder / _MODULES
    if not file.is_file():
        return []
    try:
        return [(str(one["type"]).rpartition(".")[2], str(one["path"])) for one in parsed(file, field=field)]
    except (TypeError, KeyError) as error:
        raise _refusal("is not a list of modules with type and path", file, "copy it again", field) from error


def _check(modules: list[tuple[str, str]], folder: Path, field: str) -> None:
    names = [name for name, _ in modules]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or modules[0][1]:
        raise _refusal(
            f"has the modules {', '.join(names)}; served are a Transformer in the folder itself, a Pooling, and a "
            "Normalize behind it", folder / _MODULES, "use another embedding model", field,
        )  # fmt: skip


def _mode(file: Path, field: str) -> Mode:
    config = read_json(file, field=field)
    named = config.get("pooling_mode")
    asked = [named] if isinstance(named, str) else _switched_on(config)
    if len(asked) != 1 or asked[0] not in _MODES:
        raise _refusal(
            f"has the pooling {' and '.join(asked) or '(none)'}; served is one of {', '.join(_MODES)}", file,
            "use another embedding model", field,
        )  # fmt: skip
    return _MODES[asked[0]]


def _switched_on(config: Mapping[str, Any]) -> list[str]:
    return [mode for key, mode in _OLD_KEYS.items() if config.get(f"pooling_mode_{key}")]


def _refusal(rule: str, file: Path, fix: str, field: str) -> ConfigError:
    return ConfigError(rule, path=field, value=str(file), fix=fix)
