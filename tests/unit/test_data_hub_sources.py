"""Datasets on hubs: how they are spelled, pinned, fetched once, checked, and what is said when they cannot be had."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayswift.config.job import DataSource, MediaSpec
from rayswift.data import paths
from rayswift.data.dataset_info import expand
from rayswift.data.formats import RowError
from rayswift.data.hub_copies import local_copy
from rayswift.data.hub_sources import settled, unpinned
from rayswift.data.media.reading import read
from rayswift.data.sources import index_sources, read_rows, resolve
from rayswift.data.types import Medium
from rayswift.errors import ConfigError, DataError
from tests.hub_cases import HubDataset, StandIn, commit_name, point_at, serve_hub

FIRST, SECOND = commit_name(1), commit_name(2)
README = b"""---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: test.jsonl}
- config_name: other
  data_files: other/*.jsonl
---
"""


def parquet(rows: int) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(rows)]}), sink)
    return sink.getvalue().to_pybytes()


FILES = {
    "README.md": README,
    "data/train-0.parquet": parquet(5),
    "data/train-1.parquet": parquet(3),
    "test.jsonl": b'{"text": "held out"}\n',
    "other/a.jsonl": b'{"text": "another"}\n',
}


@pytest.fixture(params=["hf", "ms"])
def hub(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, StandIn]]:
    """The prefix of each hub in turn, and a stand-in for it with org/rows in two commits."""
    branch = "main" if request.param == "hf" else "master"
    moved = FILES | {"data/train-1.parquet": parquet(4)}
    datasets = {"org/rows": HubDataset({FIRST: dict(FILES), SECOND: moved}, {branch: FIRST, "v2": SECOND})}
    with serve_hub(datasets) as stand_in:
        point_at(monkeypatch, stand_in.url, tmp_path)
        yield request.param, stand_in


def texts(source: DataSource) -> list[str]:
    files = index_sources([source])
    return [row["text"] for file in files for span in file.spans for _, _, row in read_rows(file, span)]  # type: ignore[index]


def test_a_source_is_pinned_fetched_once_and_then_needs_no_network(
    hub: tuple[str, StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, stand_in = hub
    pinned = settled(DataSource(path=f"{name}::org/rows"), place="data.train.0")
    assert pinned.path == f"{name}::org/rows@~{FIRST}"
    assert resolve(pinned, 0) == [f"{name}://datasets/org/rows@~{FIRST}/data/train-{i}.parquet" for i in (0, 1)]
    expected = [f"row {i}" for i in (*range(5), *range(3))]
    assert texts(pinned) == expected
    asked = len(stand_in.requests)
    assert texts(pinned) == expected
    assert len(stand_in.requests) == asked

    point_at(monkeypatch, "http://127.0.0.1:9", tmp_path, offline=True)
    assert texts(pinned) == expected
    assert settled(DataSource(path=f"{name}::org/rows"), place="data.train.0") == pinned
    with pytest.raises(ConfigError, match=r"data\.train\.0\.path=.*org/more is not in the cache, and cannot be had"):
        settled(DataSource(path=f"{name}::org/more"), place="data.train.0")


def test_a_node_that_has_nothing_fetches_the_same_commit(
    hub: tuple[str, StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, stand_in = hub
    pinned = settled(DataSource(path=f"{name}::org/rows"), place="data.train.0")
    (first, *_) = index_sources([pinned])
    stand_in.datasets["org/rows"].branches |= {"main": SECOND, "master": SECOND}
    point_at(monkeypatch, stand_in.url, tmp_path / "elsewhere")
    rows = [row["text"] for span in first.spans for _, _, row in read_rows(first, span)]  # type: ignore[index]
    assert rows == [f"row {i}" for i in range(5)]


def test_a_branch_that_moves_moves_new_runs_only(hub: tuple[str, StandIn]) -> None:
    name, stand_in = hub
    source = DataSource(path=f"{name}::org/rows")
    kept = {unpinned(source.path): FIRST}
    stand_in.datasets["org/rows"].branches |= {"main": SECOND, "master": SECOND}
    assert len(texts(settled(source, place="data.train.0"))) == 9
    assert settled(source, place="data.train.0", kept=kept).path.endswith(f"@~{FIRST}")
    other = source.model_copy(update={"path": f"{name}::org/rows@v2"})
    assert settled(other, place="data.train.0", kept=kept).path == f"{name}::org/rows@v2~{SECOND}"


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        (":/test", ["held out"]),
        ("/test", ["held out"]),
        (":other", ["another"]),
        (":other/train", ["another"]),
        ("@v2:default/train#6", [f"row {i}" for i in (0, 1, 2, 3, 4, 0)]),
        (f"@{SECOND}:/test#1", ["held out"]),
        ("#2", ["row 0", "row 1"]),
    ],
)
def test_spellings(hub: tuple[str, StandIn], spelled: str, expected: list[str]) -> None:
    source = settled(DataSource(path=f"{hub[0].upper()}::org/rows{spelled}"), place="data.train.0")
    assert texts(source) == expected
    assert settled(source, place="data.train.0") == source


def test_a_revision_with_slashes(hub: tuple[str, StandIn]) -> None:
    name, stand_in = hub
    datasets = stand_in.datasets["org/rows"]
    datasets.commits[commit_name(3)] = {
        "default/train/0000.parquet": parquet(2),
        "other/train/0000.parquet": parquet(1),
    }
    datasets.branches["refs/convert/parquet"] = commit_name(3)
    source = settled(DataSource(path=f"{name}::org/rows@refs/convert/parquet:default"), place="data.train.0")
    assert source.path == f"{name}::org/rows@refs/convert/parquet~{commit_name(3)}:default"
    assert texts(source) == ["row 0", "row 1"]


def test_only_the_files_that_are_needed_are_fetched(hub: tuple[str, StandIn]) -> None:
    name, stand_in = hub
    assert texts(settled(DataSource(path=f"{name}::org/rows", limit=4), place="data.train.0")) == [
        f"row {i}" for i in range(4)
    ]
    assert not [one for one in stand_in.requests if "train-1" in one]


REFUSED = [
    ("org/row", r"is no dataset on"),
    ("org/rows@v9", r"has no revision v9 on .*; check the part behind @"),
    ("org/rows:nine", r"has no subset nine; use one of default, other"),
    ("org/rows:/tets", r"has no split tets; did you mean test\?"),
    ("org/rows/a:b/c", r"names two splits"),
    ("org/rows#many", r"is no dataset of a hub; write hf::ID"),
    ("org/rows/name/x", r"is no dataset of a hub; write hf::ID"),
    ("org/rows:a/train[:5]", r"is no dataset of a hub; write hf::ID"),
    ("", r"is no dataset of a hub; write hf::ID"),
]


@pytest.mark.parametrize(("spelled", "rule"), REFUSED)
def test_what_cannot_be_is_told(hub: tuple[str, StandIn], spelled: str, rule: str) -> None:
    source = DataSource(path=f"{hub[0]}::{spelled}")
    with pytest.raises(ConfigError, match=rf"^data\.eval\.1\.path={hub[0]}::.* {rule}") as caught:
        resolve(settled(source, place="data.eval.1"), 1, path="data.eval")
    assert "\n" not in str(caught.value)


def test_two_limits_are_refused(hub: tuple[str, StandIn]) -> None:
    with pytest.raises(ConfigError, match=r"says #3, and limit=4; keep one"):
        settled(DataSource(path=f"{hub[0]}::org/rows#3", limit=4), place="data.train.0")


def test_a_gated_dataset_says_what_to_do(hub: tuple[str, StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    name, stand_in = hub
    stand_in.datasets["org/rows"].gated = True
    source = DataSource(path=f"{name}::org/rows")
    with pytest.raises(ConfigError, match=r"gated on .*accept its terms there"):
        resolve(settled(source, place="data.train.0"), 0)
    if name == "ms":
        monkeypatch.setenv("MODELSCOPE_API_TOKEN", "good")
        assert len(texts(settled(source, place="data.train.0"))) == 8


@pytest.mark.parametrize("path", ["data/train-0.parquet", "test.jsonl"])
@pytest.mark.parametrize("same_size", [True, False])
def test_other_bytes_than_the_hub_has_are_refused(hub: tuple[str, StandIn], path: str, same_size: bool) -> None:
    name, stand_in = hub
    content = FILES[path]
    stand_in.datasets["org/rows"].lies[path] = content[:-1] + b"\n\n"[: 1 if same_size else 2].replace(b"\n", b"?")
    source = settled(
        DataSource(path=f"{name}::org/rows{':/test' if path == 'test.jsonl' else ''}"), place="data.train.0"
    )
    with pytest.raises((DataError, ConfigError), match=r"and the hub says|cannot be had"):
        index_sources([source])
    stand_in.datasets["org/rows"].lies.clear()
    assert index_sources([source])[0].num_rows in (1, 5)


@pytest.mark.parametrize("path", ["data/train-0.parquet", "test.jsonl"])
def test_a_copy_that_was_changed_is_refused(hub: tuple[str, StandIn], path: str) -> None:
    name, _ = hub
    source = settled(
        DataSource(path=f"{name}::org/rows{':/test' if path == 'test.jsonl' else ''}"), place="data.train.0"
    )
    index_sources([source])
    local = os.path.realpath(local_copy(f"{name}://datasets/org/rows@~{FIRST}/{path}"))
    other = parquet(9) if path.endswith("parquet") else b'{"text": "replaced"}\n'
    Path(local).write_bytes(other)
    with pytest.raises(DataError, match=rf"{path} has .* and the hub says .*; remove .* and fetch it again"):
        index_sources([source])


def test_a_file_of_the_same_commit_is_found_and_another_is_not(hub: tuple[str, StandIn]) -> None:
    at = f"{hub[0]}://datasets/org/rows@~{FIRST}"
    assert paths.size_of(f"{at}/test.jsonl") == len(FILES["test.jsonl"])
    with paths.open_file(f"{at}/other/a.jsonl") as stream:
        assert stream.read() == FILES["other/a.jsonl"]
    with pytest.raises(FileNotFoundError):
        paths.open_file(f"{at}/nowhere.jsonl")


def test_pictures_beside_the_rows_come_from_the_same_commit(hub: tuple[str, StandIn]) -> None:
    name, stand_in = hub
    files = {"metadata.jsonl": b'{"file_name": "train/1.jpg", "text": "one"}\n', "train/1.jpg": b"pixels"}
    stand_in.datasets["org/photos"] = HubDataset({FIRST: files}, {"main": FIRST, "master": FIRST})
    source = settled(DataSource(path=f"{name}::org/photos"), place="data.train.0")
    (index,) = index_sources([source])
    ((_, _, row),) = read_rows(index, index.spans[0])
    assert row == {"text": "one", "images": ["train/1.jpg"]}
    assert read(Medium("image", "train/1.jpg"), index.path, MediaSpec()) == b"pixels"
    with pytest.raises(RowError, match="does not exist"):
        read(Medium("image", "train/2.jpg"), index.path, MediaSpec())


def test_a_worker_that_cannot_reach_the_hub_says_so(
    hub: tuple[str, StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_at(monkeypatch, "http://127.0.0.1:9", tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"test\.jsonl is not in the cache, and cannot be had from"):
        local_copy(f"{hub[0]}://datasets/org/rows@~{FIRST}/test.jsonl")


def test_what_other_programs_have_cached_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import snapshot_download

    with serve_hub({"org/rows": HubDataset({FIRST: dict(FILES)}, {"main": FIRST})}) as stand_in:
        point_at(monkeypatch, stand_in.url, tmp_path)
        snapshot_download("org/rows", repo_type="dataset", endpoint=stand_in.url, cache_dir=tmp_path / "theirs")
    point_at(monkeypatch, "http://127.0.0.1:9", tmp_path, offline=True)
    source = settled(DataSource(path="hf::org/rows:/test"), place="data.train.0")
    assert texts(source) == ["held out"]
    Path(os.path.realpath(local_copy(f"hf://datasets/org/rows@~{FIRST}/test.jsonl"))).write_bytes(
        b'{"text": "changed"}\n'
    )
    with pytest.raises(DataError, match="and the hub says"):
        index_sources([source])


def test_a_modelscope_that_knows_no_commits_is_asked_for_the_branch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = {"org/rows": HubDataset({FIRST: dict(FILES), SECOND: {}}, {"master": FIRST}, knows_commits=False)}
    with serve_hub(datasets) as stand_in:
        point_at(monkeypatch, stand_in.url, tmp_path)
        pinned = settled(DataSource(path="ms::org/rows:/test"), place="data.train.0")
        assert texts(pinned) == ["held out"]
        datasets["org/rows"].branches["master"] = SECOND
        point_at(monkeypatch, stand_in.url, tmp_path / "elsewhere")
        with pytest.raises(ConfigError, match=rf"stood at the commit {FIRST}, which the hub does not give any more"):
            index_sources([pinned])


def test_many_files_come_by_pages_and_none_lies_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = {f"data/{i:03}.jsonl": b'{"text": "%d"}\n' % i for i in range(230)}
    bad = {"../../outside.jsonl": b"{}\n"}
    datasets = {
        "org/many": HubDataset({FIRST: many}, {"master": FIRST}),
        "org/bad": HubDataset({FIRST: bad}, {"master": FIRST}),
    }
    with serve_hub(datasets) as stand_in:
        point_at(monkeypatch, stand_in.url, tmp_path)
        assert texts(settled(DataSource(path="ms::org/many"), place="data.train.0")) == [str(i) for i in range(230)]
        with pytest.raises(ConfigError, match=r"has the file \.\./\.\./outside\.jsonl, which would lie outside"):
            index_sources([settled(DataSource(path="ms::org/bad"), place="data.train.0")])


def test_the_domain_of_modelscopes_own_client_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub({"org/rows": HubDataset({FIRST: dict(FILES)}, {"master": FIRST})}) as stand_in:
        point_at(monkeypatch, stand_in.url, tmp_path)
        monkeypatch.delenv("MODELSCOPE_ENDPOINT")
        monkeypatch.setenv("MODELSCOPE_DOMAIN", stand_in.url)
        assert texts(settled(DataSource(path="ms::org/rows:/test"), place="data.train.0")) == ["held out"]


@pytest.mark.parametrize(
    ("entry", "modelscope", "path"),
    [
        ({"hf_hub_url": "org/a"}, "", "hf::org/a:/train"),
        ({"hf_hub_url": "org/a", "ms_hub_url": "org/b"}, "", "hf::org/a:/train"),
        ({"hf_hub_url": "org/a", "ms_hub_url": "org/b"}, "1", "ms::org/b:/train"),
        ({"hf_hub_url": "org/a"}, "true", "hf::org/a:/train"),
        ({"ms_hub_url": "org/b"}, "", "ms::org/b:/train"),
        ({"hf_hub_url": "org/a", "subset": "x", "split": "test"}, "", "hf::org/a:x/test"),
        ({"hf_hub_url": "org/a", "folder": "data/python"}, "", "hf::org/a:data%2Fpython/train"),
        ({"hf_hub_url": "org/a", "file_name": "a.json"}, "", "/here/a.json"),
        ({"cloud_file_name": "s3://bucket/a.json"}, "", "s3://bucket/a.json"),
    ],
)
def test_an_entry_of_a_dataset_info_names_a_hub(
    monkeypatch: pytest.MonkeyPatch, entry: dict[str, Any], modelscope: str, path: str
) -> None:
    monkeypatch.setenv("USE_MODELSCOPE_HUB", modelscope)
    monkeypatch.setattr("rayswift.data.dataset_info._entries", lambda *_: {"mine": entry | {"num_samples": 7}})
    found = expand(DataSource(path="/here/dataset_info.json", dataset="mine"), place="data.train.0")
    assert (found.path, found.limit) == (path, 7)


def test_an_entry_is_read_from_the_hub(hub: tuple[str, StandIn], tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"mine": {f"{hub[0]}_hub_url": "org/rows", "split": "test", "columns": {"prompt": "text"}}})
    )
    given = DataSource(path=str(tmp_path / "dataset_info.json"), dataset="mine")
    source = settled(given, place="data.train.0")
    assert source.path == f"{hub[0]}::org/rows@~{FIRST}:/test"
    assert texts(source) == ["held out"]


def test_the_hash_of_a_file_is_that_of_its_bytes(hub: tuple[str, StandIn], tmp_path: Path) -> None:
    (file,) = index_sources([settled(DataSource(path=f"{hub[0]}::org/rows:/test"), place="data.train.0")])
    assert file.sha256 == hashlib.sha256(FILES["test.jsonl"]).hexdigest()
    shutil.rmtree(tmp_path / "ours")
