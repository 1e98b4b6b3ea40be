"""Paths, globs, folders and URLs; limits; and the errors for what is not there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest

from rayswift.config.job import DataSource
from rayswift.data.sources import index_sources, read_rows, resolve
from rayswift.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.jsonl", "notes.xyz", "deep/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'{{"text": "{name}"}}\n' * 3)
    return tmp_path


def test_a_file_a_glob_and_a_folder(folder: Path) -> None:
    def names(path: str) -> list[str]:
        return [name.removeprefix(f"{folder}/") for name in resolve(DataSource(path=f"{folder}/{path}"), 0)]

    assert names("a.jsonl") == ["a.jsonl"]
    assert names("*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names("**/*.jsonl") == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    assert names("") == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]


def test_a_folder_stands_for_its_data_only(tmp_path: Path) -> None:
    beside = [
        *("README.md", "readme.txt", "README_zh.txt", "LICENSE", "LICENSE.txt", "dataset_info.json"),
        *("dataset_infos.json", "dataset_info_v2.json", "notes.md", ".hidden.jsonl", ".cache/a.jsonl", "x/.git/a.txt"),
    ]
    for name in (*beside, "a.jsonl", "x/b.txt", "license_plates.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x\n")

    def names(path: Path | str) -> list[str]:
        return [name.removeprefix(f"{tmp_path}/") for name in resolve(DataSource(path=str(path)), 0)]

    assert names(tmp_path) == ["a.jsonl", "license_plates.csv", "x/b.txt"]
    assert names(f"{tmp_path}/") == names(tmp_path)
    assert names(tmp_path / ".cache") == [".cache/a.jsonl"]
    assert names(tmp_path / "notes.md") == ["notes.md"]
    assert names(tmp_path / "*.md") == ["README.md", "notes.md"]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text("x\n")
    with pytest.raises(ConfigError, match=r"^data\.train\.0\.path=\S+ is a folder without data; .* with \.csv, "):
        names(tmp_path / "docs")
    with pytest.raises(ConfigError, match=r"^--rows=\S+ is a folder without data"):
        resolve(DataSource(path=str(tmp_path / "docs")), 0, path="--rows")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("zip://b.jsonl::z.zip", ["zip://b.jsonl::{0}/z.zip"]),
        ("zip://*.jsonl::file://{0}/z.zip", ["zip://a.jsonl::file://{0}/z.zip", "zip://b.jsonl::file://{0}/z.zip"]),
        ("zip://deep::{0}/z.zip", ["zip://deep/c.tsv::{0}/z.zip"]),
        ("simplecache::file://{0}/a.jsonl", ["simplecache::file://{0}/a.jsonl"]),
        ("simplecache::{0}/*.jsonl", ["simplecache::{0}/a.jsonl", "simplecache::{0}/b.jsonl"]),
        ("simplecache::zip://b.jsonl::{0}/z.zip", ["simplecache::zip://b.jsonl::{0}/z.zip"]),
    ],
)
def test_chained_urls(folder: Path, path: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with ZipFile(folder / "z.zip", "w") as archive:
        for name in ("a.jsonl", "b.jsonl"):
            archive.write(folder / name, name)
        archive.writestr("deep/c.tsv", "text\tx\n1\t2\n")
    monkeypatch.chdir(folder)
    source = DataSource(path=path.format(folder))
    assert resolve(source, 0) == [one.format(folder) for one in expected]
    monkeypatch.chdir("/")
    files = index_sources([source.model_copy(update={"path": expected[0].format(folder)})])
    rows = [row for file in files for span in file.spans for _, _, row in read_rows(file, span)]
    if "deep" in path:
        assert rows == [{"text": "1", "x": "2"}]
    else:
        plain = folder / ("a.jsonl" if "a.jsonl" in expected[0] else "b.jsonl")
        assert rows == [json.loads(line) for line in plain.read_text().splitlines()]
        assert rows


def test_a_chained_url_that_leads_nowhere(folder: Path) -> None:
    with ZipFile(folder / "z.zip", "w") as archive:
        archive.write(folder / "a.jsonl", "a.jsonl")
    for path, rule in (
        (f"zip://a.jsnl::{folder}/z.zip", r"did you mean a\.jsonl\?"),
        ("zip://a::/no.zip", "cannot be"),
    ):
        with pytest.raises(ConfigError, match=rule):
            resolve(DataSource(path=path), 0)


def test_a_relative_path_becomes_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert resolve(DataSource(path="a.jsonl"), 0) == [str(folder / "a.jsonl")]


def test_brackets_in_an_existing_name_are_no_glob(tmp_path: Path) -> None:
    (tmp_path / "x[1].jsonl").write_text("{}\n")
    assert resolve(DataSource(path=str(tmp_path / "x[1].jsonl")), 0) == [str(tmp_path / "x[1].jsonl")]


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("a.jsnl", r"^data\.train\.2\.path=.*a\.jsnl does not exist.*did you mean .*/a\.jsonl\?$"),
        ("*.csv", r"\*\.csv matches no file"),
        ("nowhere/a.jsonl", r"its folder .*nowhere does not exist"),
        ("notes.xyz", r"has no extension that a reader knows; use one of \.csv, \.json, \.jsonl"),
    ],
)
def test_what_is_not_there_is_named(folder: Path, name: str, rule: str) -> None:
    sources = [DataSource(path=str(folder / one)) for one in ("a.jsonl", "b.jsonl", name)]
    with pytest.raises(ConfigError, match=rule):
        index_sources(sources)


def test_an_unknown_protocol_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^data\.eval\.0\.path=nosuch://x cannot be opened: .*nosuch") as caught:
        resolve(DataSource(path="nosuch://x"), 0, path="data.eval")
    assert "\n" not in str(caught.value)


def test_limit_counts_over_the_files_of_a_source(folder: Path) -> None:
    files = index_sources(
        [DataSource(path=f"{folder}/*.jsonl", limit=4), DataSource(path=f"{folder}/a.jsonl")], span_rows=2
    )
    assert [(file.source, file.num_rows) for file in files] == [(0, 3), (0, 1), (1, 3)]
    assert [len(list(read_rows(file, span))) for file in files for span in file.spans] == [2, 1, 1, 2, 1]


def test_memory_urls() -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/data/x.jsonl", b'{"a": 1}\n')
    (file,) = index_sources([DataSource(path="memory://data/*.jsonl")])
    assert file.path == "memory:///data/x.jsonl"
    assert [row for span in file.spans for _, _, row in read_rows(file, span)] == [{"a": 1}]


@pytest.fixture
def s3_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket on a real S3 server in this process."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("rows")
    yield "rows"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_s3(s3_bucket: str) -> None:
    import s3fs

    s3fs.S3FileSystem().pipe(f"{s3_bucket}/train/x.jsonl", b"".join(b'{"i": %d}\n' % i for i in range(10)))
    (file,) = index_sources([DataSource(path=f"s3://{s3_bucket}/train/*.jsonl")], span_rows=3)
    assert file.path == f"s3://{s3_bucket}/train/x.jsonl"
    assert [row["i"] for span in reversed(file.spans) for _, _, row in read_rows(file, span)] == [
        9,
        6,
        7,
        8,
        3,
        4,
        5,
        0,
        1,
        2,
    ]  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"did you mean rows/train/x\.jsonl"):
        index_sources([DataSource(path=f"s3://{s3_bucket}/train/y.jsonl")])
