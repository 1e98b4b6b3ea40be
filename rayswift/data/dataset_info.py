"""LLaMA-Factory's `dataset_info.json`: an entry of it as a source of this project, its columns and tags mapped.

Knows that file's words and defaults. Without `columns` an entry has the standard ones; with them only what is listed.
`num_samples` are the first rows here, and a random part there. An entry that has a local file is that file, whatever
else it names; then it is the dataset on the hub that it names, ModelScope's if USE_MODELSCOPE_HUB says so or there is
no other. Its `folder` is taken for the subset that it restricts the files to.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from rayswift.config.job import DataSource
from rayswift.data.paths import open_file
from rayswift.errors import ConfigError

FILE_NAME = "dataset_info.json"
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
"""Its words for the columns of a pair, and the columns they stand for if an entry does not say."""
_OURS = {
    **_ALPACA,
    "messages": "conversations", "history": "history", "system": "system", "tools": "tools", "images": "images",
    "videos": "videos", "audios": "audios", "chosen": "chosen", "rejected": "rejected", "kto_tag": "label",
}  # fmt: skip
_ALSO_READ = ("context",)
_MEDIA = {"images", "videos", "audios"}


def expand(source: DataSource, *, place: str) -> DataSource:
    """The source that `dataset` names in the dataset_info.json at `path`; any other source as it is.

    Raises ConfigError for a file that is none, a name it does not have, and an entry that this version cannot read.
    """
    if source.dataset is None and source.path.rpartition("/")[2] != FILE_NAME:
        return source
    entries = _entries(source.path, place)
    if source.dataset is None or source.dataset not in entries:
        raise _unknown(source, entries, place)
    entry, folder = entries[source.dataset], source.path.rpartition("/")[0] or "."
    columns = _columns(entry)
    if "response" not in columns and "chosen" not in columns and "messages" not in columns:
        renamed, found = {columns["prompt"]: "text"}, "text"  # documents: a prompt that nothing answers
    else:
        renamed = {theirs: _OURS[word] for word, theirs in columns.items()}
        found = "sharegpt" if "messages" in columns and "chosen" not in columns else "auto"
    read = {*_OURS.values(), *_ALSO_READ} - _MEDIA  # an image that is left out would leave an answer to nothing
    hidden = {name: f"unused_{name}" for name in read - {*renamed, *renamed.values()}}
    return source.model_copy(
        update={
            "dataset": None,
            "path": _path(entry, folder, source, place),
            "format": found if source.format == "auto" else source.format,
            "columns": {k: v for k, v in renamed.items() if k != v} | hidden | source.columns,
            "tags": dict(entry.get("tags", {})) | source.tags,
            "limit": source.limit or entry.get("num_samples"),
        }
    )


def _entries(path: str, place: str) -> Mapping[str, dict[str, Any]]:
    try:
        with open_file(path) as stream:
            found = json.load(stream)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error}", path=f"{place}.path", value=path) from error
    except ValueError as error:
        raise ConfigError(f"is not JSON: {error}", path=f"{place}.path", value=path) from error
    if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
        raise ConfigError(
            f"is no {FILE_NAME}", path=f"{place}.path", value=path, fix="it maps a name to file_name and columns"
        )
    return found


def _unknown(source: DataSource, entries: Mapping[str, Any], place: str) -> ConfigError:
    here = [name for name, entry in entries.items() if {"file_name", "hf_hub_url", "ms_hub_url"} & entry.keys()]
    close = difflib.get_close_matches(source.dataset or "", entries, n=1)
    hint = f"did you mean {close[0]}?" if close else f"set {place}.dataset to one of {', '.join(here[:12])}"
    rule = f"names no entry of {source.path}" if source.dataset else f"is a {FILE_NAME}, and says not which entry"
    if source.dataset is None:
        return ConfigError(rule, path=f"{place}.path", value=source.path, fix=hint)
    return ConfigError(rule, path=f"{place}.dataset", value=source.dataset, fix=hint)


def _columns(entry: Mapping[str, Any]) -> dict[str, str]:
    """Its word -> the column of the rows, for the words that it reads."""
    given = entry.get("columns")
    if given is None:
        return {"messages": "conversations"} if entry.get("formatting", "alpaca") != "alpaca" else _ALPACA
    return {word: column for word, column in given.items() if word in _OURS and column}


def _beside(folder: str, name: str) -> str:
    return name if name.startswith("/") or "://" in name else f"{folder}/{name}"


def _path(entry: Mapping[str, Any], folder: str, source: DataSource, place: str) -> str:
    local = entry.get("file_name") or entry.get("cloud_file_name")
    if isinstance(local, str):
        return _beside(folder, local)
    hf, ms = entry.get("hf_hub_url"), entry.get("ms_hub_url")
    prefer_ms = os.environ.get("USE_MODELSCOPE_HUB", "0").lower() in ("1", "true", "y")
    hub, repo = ("ms", ms) if ms and (prefer_ms or not hf) else ("hf", hf)
    subset, below = entry.get("subset"), entry.get("folder")
    if not repo or (subset and below):
        what = (
            "a subset and a folder of it" if repo else entry.get("script_url") or entry.get("om_hub_url") or "nothing"
        )
        raise ConfigError(
            f"stands for {what}, which this version does not load", path=f"{place}.dataset",
            value=source.dataset, fix="download it beside the file and give the entry a file_name",
        )  # fmt: skip
    return f"{hub}::{repo}:{quote(str(subset or below or ''), safe=' ')}/{entry.get('split') or 'train'}"
