"""Which files of a dataset's repository a subset and a split have, by the rules of Hugging Face's `datasets`.

The `configs` at the head of README.md name the files of each split by patterns. Without them, files belong to the split
that their folders or names speak of: `data/train-00000-of-00004.parquet` first, then `test/a.jsonl`, then `a-valid.csv`
(train or training; validation, valid, dev or val; test, testing, eval or evaluation, between marks or digits); where
none does, all files are `train`. Then only the most frequent kind of file counts. A subset that README.md does not name
is a folder. Reads nothing: it is given names and the text of README.md.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from rayswift.data.hubs import HubError

_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SEP = r"[-._ 0-9]"
_SHARD = re.compile(r"data/(?P<split>[^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_NO_DATA = re.compile(
    r"(README|LICENSE)(\..*)?|config\.json|dataset_info\.json|dataset_infos\.json|dataset_dict\.json", re.I
)
_FRONT = re.compile(r"\s*---\s*\n(.*?)\n---", re.DOTALL)


def choose(
    names: Sequence[str], readme: str, subset: str | None, split: str | None, kinds: Mapping[str, str]
) -> list[str]:
    """The files of a split, sorted. `kinds` has the endings that can be read, and what reads them.

    Without `split` it is `train`, or the only one. Raises HubError with what there is for one that there is not.
    """
    names = [name for name in names if _is_data(name)]
    known = [name for name in names if _kind(name, kinds)]
    if not known:
        endings = Counter("." + name.rpartition(".")[2] for name in names if "." in name.rpartition("/")[2])
        common = ", ".join(ending for ending, _ in endings.most_common(5)) or "nothing"
        raise HubError(
            f"has no file of rows that can be read, but {common}",
            f"what can be read is {', '.join(sorted(kinds))}; the hub of hf:: keeps many as Parquet under "
            "@refs/convert/parquet",
        )
    splits = _splits(known, readme, subset, kinds)
    wanted = split or ("train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None)
    if wanted not in splits or not splits[wanted]:
        there = [name for name, files in splits.items() if files]
        if not there:
            raise HubError("has no file of rows in what README.md says of it", "name its files by URL instead")
        rule = f"has no split {split}" if split else "has several splits, and which is meant is not said"
        raise HubError(rule, f"{_close(split, there)}, as in `:{subset or ''}/{there[0]}`")
    return sorted(splits[wanted])


def _splits(names: Sequence[str], readme: str, subset: str | None, kinds: Mapping[str, str]) -> dict[str, list[str]]:
    configs = _configs(readme)
    chosen = _config(configs, subset)
    folder = ""
    if chosen is None and subset is not None:
        folder = f"{subset.strip('/')}/"
        if not any(name.startswith(folder) for name in names):
            folders = {name.split("/")[0] for name in names if "/" in name}
            there = [str(config.get("config_name")) for config in configs] or sorted(folders)
            raise HubError(f"has no subset {subset}", _close(subset, there) if there else "leave the subset out")
    elif chosen is not None and chosen.get("data_dir"):
        folder = str(chosen["data_dir"]).strip("./").rstrip("/") + "/"
    below = [name.removeprefix(folder) for name in names if name.startswith(folder)]
    patterns = _patterns((chosen or {}).get("data_files"))
    found = (
        {split: _matching(below, given) for split, given in patterns.items()} if patterns else _by_name(below, kinds)
    )
    return {split: [folder + name for name in own] for split, own in found.items()}


def _configs(readme: str) -> list[dict[str, Any]]:
    """The subsets that README.md declares, none if it declares nothing. Raises HubError for a head that is no YAML."""
    head = _FRONT.match(readme)
    try:
        about = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError as error:
        raise HubError("has a README.md whose head is no YAML", "name its files by URL instead") from error
    configs = about.get("configs") if isinstance(about, dict) else None
    return [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []


def _config(configs: list[dict[str, Any]], subset: str | None) -> dict[str, Any] | None:
    if subset is not None:
        return next((config for config in configs if str(config.get("config_name")) == subset), None)
    if len(configs) < 2:
        return configs[0] if configs else None
    default = [config for config in configs if config.get("default") or config.get("config_name") == "default"]
    if not default:
        there = [str(config.get("config_name")) for config in configs]
        raise HubError(
            "has several subsets, and which is meant is not said", f"{_close(None, there)}, as in `:{there[0]}`"
        )
    return default[0]


def _patterns(given: Any) -> dict[str, list[str]]:
    """Split -> patterns, from the four ways to write `data_files`."""
    if isinstance(given, str):
        return {"train": [given]}
    if isinstance(given, dict):
        return {str(split): _list(patterns) for split, patterns in given.items()}
    if not isinstance(given, list):
        return {}
    if all(isinstance(one, dict) for one in given):
        return {str(one.get("split")): _list(one.get("path")) for one in given}
    return {"train": _list(given)}


def _list(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    from fsspec.utils import glob_translate

    found: dict[str, None] = {}
    for pattern in (pattern.removeprefix("./") for pattern in patterns):
        try:
            rule = re.compile(glob_translate(re.sub(r"\*\*(?=[^/])", "**/*", pattern)))
        except ValueError as error:
            raise HubError(
                f"has a README.md with the pattern {pattern}, which is none", "name its files by URL"
            ) from error
        found |= dict.fromkeys(name for name in names if name == pattern or rule.match(name))
    return list(found)


def _by_name(names: Sequence[str], kinds: Mapping[str, str]) -> dict[str, list[str]]:
    if not names:
        return {}
    readers = Counter(_kind(name, kinds) for name in names)
    texts = kinds.get(".txt")
    most = max(readers, key=lambda reader: (readers[reader], reader != texts, reader))
    names = [name for name in names if _kind(name, kinds) == most]
    shards: dict[str, list[str]] = {}
    for name in names:
        if shard := _SHARD.fullmatch(name):
            shards.setdefault(shard["split"], []).append(name)
    by_folder = {split: [name for name in names if _folders(words).match(name)] for split, words in _WORDS.items()}
    by_name = {split: [name for name in names if _file(words).match(name)] for split, words in _WORDS.items()}
    for found in (shards, by_folder, by_name):
        if any(found.values()):
            return {split: own for split, own in found.items() if own}
    return {"train": list(names)}


def _folders(words: Sequence[str]) -> re.Pattern[str]:
    return re.compile(rf"(.*/)?([^/]*{_SEP})?({'|'.join(words)})({_SEP}[^/]*)?/.+")


def _file(words: Sequence[str]) -> re.Pattern[str]:
    return re.compile(rf"(.*/)?([^/]*{_SEP})?({'|'.join(words)}){_SEP}[^/]*$")


def _kind(name: str, kinds: Mapping[str, str]) -> str | None:
    return next((reader for ending, reader in kinds.items() if name.lower().endswith(ending)), None)


def _is_data(name: str) -> bool:
    parts = name.split("/")
    return not any(part.startswith((".", "__")) for part in parts) and not _NO_DATA.fullmatch(parts[-1])


def _close(wanted: str | None, there: Sequence[str]) -> str:
    close = difflib.get_close_matches(wanted or "", there, n=1)
    return f"did you mean {close[0]}?" if close else f"use one of {', '.join(there[:12])}"
