"""Datasets on hubs as sources: `hf::ID[@REVISION][:SUBSET][/SPLIT][#N]`, and `ms::...` for ModelScope.

    hf::openai/gsm8k                          the split train of the default subset, at the commit of today
    hf::openai/gsm8k@main:socratic/test#100   the first 100 rows of another split of another subset
    hf::org/name@v1.0:/test                   behind a revision a split is written with the colon, for a revision
    hf::org/name@refs/convert/parquet         may have slashes of its own

ms-swift writes `hf::ID:SUBSET1/SUBSET2#N` for several subsets and N random rows; here what follows the slash is the
split, N are the first rows, and further subsets are further sources. A slash in a subset's name is written %2F.

A source is pinned before anything is read: `hf::ID@REVISION~COMMIT:...`. Its files are then
`hf://datasets/ID@~COMMIT/path`, the same text on every node, behind which each node has its own copy in its hub's
cache, fetched at the first use, checked, and never asked for again: reading spans over the network would make every
epoch depend on it. What a split has is known by `splits`; how a hub is spoken to, by `hubs`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote

from rayswift.config.job import DataSource, is_hub_dataset
from rayswift.data.dataset_info import expand
from rayswift.data.hub_copies import hub_named, tree_of, url_of
from rayswift.data.hubs import COMMIT, HubError, HubFile, Pin
from rayswift.data.splits import choose
from rayswift.errors import ConfigError

_SPELLING = re.compile(
    r"(?P<hub>hf|ms)::(?P<repo>[\w.-]+(/[\w.-]+)?)"
    r"(@(?P<name>[^:#~]*)(~(?P<commit>[0-9a-f]{40}))?|/(?P<own>[\w.-]+))?"
    r"(:(?P<subset>[^:/#]*)(/(?P<split>[\w.-]+))?)?(#(?P<limit>[0-9]+))?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Source:
    hub: str
    repo: str
    name: str
    commit: str | None
    subset: str | None
    split: str | None
    limit: int | None

    @property
    def pin(self) -> Pin:
        assert self.commit is not None, "a source is pinned before its files are named"
        return Pin(self.name, self.commit)

    def text(self) -> str:
        """The source as it is spelled."""
        revision = f"@{self.name}" if self.name or self.commit else ""
        commit = f"~{self.commit}" if self.commit else ""
        part = f":{quote(self.subset or '', safe=' ')}" if self.subset or self.split else ""
        part += f"/{self.split}" if self.split else ""
        return f"{self.hub}::{self.repo}{revision}{commit}{part}{'' if self.limit is None else f'#{self.limit}'}"


def settled(source: DataSource, *, place: str, kept: Mapping[str, str] | None = None) -> DataSource:
    """The source with what it names looked up: an entry of a dataset_info.json, and the commit of a hub's dataset.

    `kept` has the commits that a run began with, by source without commit: they stay, wherever a branch has moved.
    Raises ConfigError for what is misspelled, what a hub does not have, and one that cannot be reached.
    """
    source = expand(source, place=place)
    if not is_hub_dataset(source.path):
        return source
    spelled = _parse(source.path, place)
    if source.limit is not None and spelled.limit is not None:
        raise ConfigError(f"says #{spelled.limit}, and limit={source.limit}", path=f"{place}.path", value=source.path,
                          fix="keep one of the two")  # fmt: skip
    if spelled.commit is None:
        known = (kept or {}).get(unpinned(source.path))
        with _refused(source.path, f"{place}.path"):
            commit = known or (spelled.name if COMMIT.fullmatch(spelled.name) else None)
            commit = commit or hub_named(spelled.hub).commit(spelled.repo, spelled.name)
        spelled = replace(spelled, commit=commit)
    return source.model_copy(update={"path": spelled.text()})


def unpinned(path: str) -> str:
    """A hub's source without its commit and number of rows, spelled in one way."""
    return replace(_parse(path, "data.train"), commit=None, limit=None).text()


def commit_of(path: str) -> str | None:
    """The commit that a hub's source is pinned to."""
    return _parse(path, "data.train").commit


def limit_of(source: DataSource) -> int | None:
    """The number of rows that are used of a source, None for all."""
    return _parse(source.path, "data.train").limit if is_hub_dataset(source.path) and not source.limit else source.limit


def hub_files(source: DataSource, kinds: Mapping[str, str], *, place: str) -> list[str]:
    """The URLs of the files of a hub's source, sorted; `kinds` as in `splits.choose`. Raises ConfigError."""
    spelled = _parse(settled(source, place=place.removesuffix(".path")).path, place)
    with _refused(source.path, place):
        files = tree_of(spelled.hub, spelled.repo, spelled.pin)
        readme = _readme(spelled, files)
        chosen = choose(sorted(files), readme, spelled.subset, spelled.split, kinds)
    return [url_of(spelled.hub, spelled.repo, spelled.pin, path) for path in chosen]


def _parse(path: str, place: str) -> _Source:
    found = _SPELLING.fullmatch(path.strip())
    if found is None:
        raise ConfigError(
            "is no dataset of a hub", path=place if place.endswith("path") else f"{place}.path", value=path,
            fix="write hf::ID[@REVISION][:SUBSET][/SPLIT][#N], as in hf::org/name:default/train#1000",
        )  # fmt: skip
    split, subset = found["split"] or found["own"], found["subset"]
    if found["own"] and found["split"]:
        raise ConfigError("names two splits", path=f"{place}.path", value=path, fix=f"leave out /{found['own']}")
    return _Source(
        found["hub"].lower(), found["repo"], found["name"] or "", found["commit"], unquote(subset) if subset else None,
        split, int(found["limit"]) if found["limit"] else None,
    )  # fmt: skip


def _readme(source: _Source, files: Mapping[str, HubFile]) -> str:
    if "README.md" not in files:
        return ""
    with open(hub_named(source.hub).download(source.repo, source.pin, files["README.md"]), encoding="utf-8") as stream:
        return stream.read()


@contextmanager
def _refused(path: str, place: str) -> Iterator[None]:
    try:
        yield
    except HubError as error:
        raise ConfigError(error.rule, path=place, value=path, fix=error.fix) from error
