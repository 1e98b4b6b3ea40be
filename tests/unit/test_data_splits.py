"""Which files a subset and a split have: what README.md declares, and what names say without it."""

from __future__ import annotations

import pytest

from rayswift.data.hubs import HubError
from rayswift.data.splits import choose

KINDS = {".jsonl": "jsonl", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text", ".tar": "webdataset"}


def front(text: str) -> str:
    return f"---\nlicense: mit\n{text}\n---\n# About\n"


GSM8K = front(
    "configs:\n"
    "- config_name: main\n  data_files:\n  - {split: train, path: main/train-*}\n  - {split: test, path: main/test-*}\n"
    "- config_name: socratic\n  data_files:\n  - {split: train, path: socratic/train-*}\n"
)
GSM8K_FILES = [
    "README.md", ".gitattributes", "main/train-00000-of-00001.parquet", "main/test-00000-of-00001.parquet",
    "socratic/train-00000-of-00001.parquet",
]  # fmt: skip


@pytest.mark.parametrize(
    ("readme", "names", "subset", "split", "expected"),
    [
        (GSM8K, GSM8K_FILES, "main", "test", ["main/test-00000-of-00001.parquet"]),
        (GSM8K, GSM8K_FILES, "socratic", None, ["socratic/train-00000-of-00001.parquet"]),
        (front("configs: [{config_name: a, data_files: 'x/*.csv'}]"), ["x/2.csv", "x/1.csv", "x/y/3.csv"], None, None,
         ["x/1.csv", "x/2.csv"]),
        (front("configs: [{config_name: a, data_files: ['**/*.csv']}]"), ["1.csv", "x/y/3.csv", "b.json"], "a", "train",
         ["1.csv", "x/y/3.csv"]),
        (front("configs: [{config_name: a, data_files: '**.csv'}]"), ["1.csv", "x/2.csv"], None, None,
         ["1.csv", "x/2.csv"]),
        (front("configs: [{config_name: a, data_files: {dev: d.json, train: [t.json, ./u.json]}}]"),
         ["d.json", "t.json", "u.json"], None, None, ["t.json", "u.json"]),
        (front("configs: [{config_name: a, data_files: 'odd[1].csv'}]"), ["odd[1].csv", "odd1.csv"], None, None,
         ["odd1.csv", "odd[1].csv"]),
        (front("configs: [{config_name: b, data_dir: in, data_files: '*.csv'}]"), ["in/1.csv", "2.csv"], None, None,
         ["in/1.csv"]),
        (front("configs: [{config_name: b, data_dir: ./in}]"), ["in/train.csv", "in/test.csv", "train.csv"], None,
         "test", ["in/test.csv"]),
        (front("configs: [{config_name: a, data_files: 1.csv}, {config_name: default, data_files: 2.csv}]"),
         ["1.csv", "2.csv"], None, None, ["2.csv"]),
        (front("configs: [{config_name: a, data_files: 1.csv}, {config_name: b, data_files: 2.csv, default: true}]"),
         ["1.csv", "2.csv"], None, None, ["2.csv"]),
        (front("configs: [{config_name: only, features: []}]"), ["1.csv"], None, None, ["1.csv"]),
        (front("configs: [{config_name: a, data_files: [{split: test, path: 1.csv}]}]"), ["1.csv"], None, None,
         ["1.csv"]),
        ("", ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002-abc.parquet",
              "data/test_sft-00000-of-00001.parquet", "extra/train.jsonl"], None, "test_sft",
         ["data/test_sft-00000-of-00001.parquet"]),
        ("", ["train/a.jsonl", "my-dev/b.jsonl", "testing/x/c.jsonl", "readme.txt"], None, "validation",
         ["my-dev/b.jsonl"]),
        ("", ["train/a.jsonl", "my-dev/b.jsonl", "testing/x/c.jsonl"], None, "test", ["testing/x/c.jsonl"]),
        ("", ["a-train.csv", "a_valid_1.csv", "eval2.csv", "trainer.csv"], None, None, ["a-train.csv"]),
        ("", ["a-train.csv", "a_valid_1.csv", "eval2.csv", "trainer.csv"], None, "test", ["eval2.csv"]),
        ("", ["constrained.csv", "latest.csv"], None, None, ["constrained.csv", "latest.csv"]),
        ("", ["rows.jsonl", "requirements.txt"], None, None, ["rows.jsonl"]),
        ("", ["a.parquet", "b.parquet", "a.jsonl"], None, None, ["a.parquet", "b.parquet"]),
        ("", ["train.jsonl", "__pycache__/x.jsonl", ".cache/y.jsonl", "dataset_infos.json", "README.md"], None, None,
         ["train.jsonl"]),
        ("", ["python/train.jsonl", "python/test.jsonl", "ruby/train.jsonl"], "python", "test", ["python/test.jsonl"]),
        ("", ["data/python/x.jsonl", "data/ruby/x.jsonl"], "data/python", None, ["data/python/x.jsonl"]),
        ("# no head", ["a.jsonl"], None, None, ["a.jsonl"]),
        (front("configs: none"), ["a.jsonl"], None, None, ["a.jsonl"]),
        ("", ["shard-000.TAR", "shard-001.tar"], None, "train", ["shard-000.TAR", "shard-001.tar"]),
    ],
)  # fmt: skip
def test_the_files_of_a_split(
    readme: str, names: list[str], subset: str | None, split: str | None, expected: list[str]
) -> None:
    assert choose(names, readme, subset, split, KINDS) == expected


@pytest.mark.parametrize(
    ("readme", "names", "subset", "split", "rule", "fix"),
    [
        (GSM8K, GSM8K_FILES, None, None, "has several subsets, and which is meant", "main, socratic, as in `:main`"),
        (GSM8K, GSM8K_FILES, "mian", None, "has no subset mian", "did you mean main?"),
        (GSM8K, GSM8K_FILES, "main", "tset", "has no split tset", "did you mean test?, as in `:main/"),
        (GSM8K, GSM8K_FILES, "main", "validation", "has no split validation", "use one of train, test"),
        ("", ["a.zip", "b.bin", "README.md"], None, None, "no file of rows that can be read, but .zip", ".parquet"),
        ("", [], None, None, "but nothing", "what can be read"),
        ("", ["dev.csv", "test.csv"], None, None, "has several splits", "validation, test"),
        ("", ["x/a.csv", "y/b.csv"], "z", None, "has no subset z", "use one of x, y"),
        ("", ["a.csv"], "z", None, "has no subset z", "leave the subset out"),
        (front("configs: [{config_name: a, data_files: '*.json'}]"), ["a.csv"], None, None, "in what README.md", "URL"),
        (front("configs: [{config_name: a, data_dir: x}]"), ["a.csv"], None, None, "in what README.md says", "URL"),
        (front("configs: [{config_name: a, data_files: 'a**'}]"), ["a.csv"], None, None, "the pattern a**", "URL"),
        ("---\na: [\n---\n", ["a.csv"], None, None, "head is no YAML", "URL"),
    ],
)  # fmt: skip
def test_what_there_is_not_is_told(
    readme: str, names: list[str], subset: str | None, split: str | None, rule: str, fix: str
) -> None:
    with pytest.raises(HubError) as caught:
        choose(names, readme, subset, split, KINDS)
    assert rule in caught.value.rule
    assert fix in caught.value.fix
