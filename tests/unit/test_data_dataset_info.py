"""LLaMA-Factory's dataset_info.json: every kind of entry becomes a source whose rows are the ones it means."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rayswift.config.job import DataSource
from rayswift.data.dataset_info import expand
from rayswift.data.detect import normalise
from rayswift.data.formats import RowError
from rayswift.data.inspect import preflight
from rayswift.data.sources import index_sources, read_rows
from rayswift.data.types import Message, Sample
from rayswift.errors import ConfigError


def source_of(folder: Path, entry: dict[str, Any], rows: list[dict[str, Any]], **settings: Any) -> DataSource:
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "rows.json", **entry}}))
    given = DataSource(path=str(folder / "dataset_info.json"), dataset="mine", **settings)
    return expand(given, place="data.train.0")


def samples(source: DataSource) -> list[Sample | str]:
    files = index_sources([source])
    (name,) = preflight([source], files)
    found: list[Sample | str] = []
    for file in files:
        for span in file.spans:
            for _, _, row in read_rows(file, span):
                assert isinstance(row, dict)
                try:
                    found.append(normalise(row, name, source))
                except RowError as error:
                    found.append(str(error))
    return found


def test_an_entry_that_says_nothing_is_alpaca(tmp_path: Path) -> None:
    source = source_of(tmp_path, {}, [{"instruction": "a", "input": "b", "output": "c"}])
    assert samples(source) == [Sample((Message("user", "a\nb"), Message("assistant", "c")))]


def test_columns_are_mapped_and_those_not_listed_are_not_read(tmp_path: Path) -> None:
    rows = [{"q": "a", "input": "not this", "a": "c", "s": "be brief", "context": "nor this"}]
    source = source_of(tmp_path, {"columns": {"prompt": "q", "response": "a", "system": "s"}}, rows)
    expected = (Message("system", "be brief"), Message("user", "a"), Message("assistant", "c"))
    assert samples(source) == [Sample(expected)]


def test_columns_that_trade_names(tmp_path: Path) -> None:
    rows = [{"output": "question", "input": "answer"}]
    source = source_of(tmp_path, {"columns": {"prompt": "output", "response": "input"}}, rows)
    assert samples(source) == [Sample((Message("user", "question"), Message("assistant", "answer")))]


def test_a_prompt_that_nothing_answers_is_a_document(tmp_path: Path) -> None:
    assert samples(source_of(tmp_path, {"columns": {"prompt": "content"}}, [{"content": "all of it"}])) == [
        Sample(text="all of it")
    ]


def test_tags_rename_the_keys_and_the_roles_of_turns(tmp_path: Path) -> None:
    tags = {"role_tag": "speaker", "content_tag": "said", "user_tag": "customer", "assistant_tag": "clerk"}
    turns = [{"speaker": "customer", "said": "a"}, {"speaker": "clerk", "said": "b"}]
    entry = {"formatting": "sharegpt", "columns": {"messages": "talk"}, "tags": tags}
    source = source_of(tmp_path, entry, [{"talk": turns}, {"talk": [{"speaker": "judge", "said": "c"}]}])
    good, bad = samples(source)
    assert good == Sample((Message("user", "a"), Message("assistant", "b")))
    assert "has the role 'judge'" in str(bad)


def test_num_samples_limits_and_the_job_goes_before(tmp_path: Path) -> None:
    rows = [{"instruction": str(i), "output": "x"} for i in range(5)]
    assert len(samples(source_of(tmp_path, {"num_samples": 3}, rows))) == 3
    assert len(samples(source_of(tmp_path, {"num_samples": 3}, rows, limit=2))) == 2


@pytest.mark.parametrize("name", ["/data/rows.json", "s3://bucket/rows.json"])
def test_a_file_elsewhere_is_where_it_says(tmp_path: Path, name: str) -> None:
    assert source_of(tmp_path, {"file_name": name}, []).path == name


def test_media_that_an_entry_does_not_list_are_not_left_out(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", "images": ["x.jpg"]}]
    (medium,) = samples(source_of(tmp_path, {}, rows))[1].media
    assert (medium.kind, medium.source) == ("image", "x.jpg")


def test_expanding_twice_changes_nothing(tmp_path: Path) -> None:
    source = source_of(tmp_path, {}, [{"instruction": "a", "output": "b"}])
    assert expand(source, place="data.train.0") == source


@pytest.mark.parametrize(
    ("text", "dataset", "message"),
    [
        ('{"mine": {"file_name": "a.json"}}', "mime", "did you mean mine?"),
        ('{"mine": {"file_name": "a.json"}}', None, "set data.train.0.dataset to one of mine"),
        ('{"mine": {"script_url": "script"}}', "mine", "stands for script, which this version does not load"),
        ('{"mine": {"hf_hub_url": "o/n", "subset": "a", "folder": "b"}}', "mine", "stands for a subset and a folder"),
        ("[]", "mine", "is no dataset_info.json"),
        ("{", "mine", "is not JSON"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, text: str, dataset: str | None, message: str) -> None:
    (tmp_path / "dataset_info.json").write_text(text)
    source = DataSource(path=str(tmp_path / "dataset_info.json"), dataset=dataset)
    with pytest.raises(ConfigError, match=re.escape(message)):
        expand(source, place="data.train.0")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape("data.eval.1.path")):
        expand(DataSource(path=str(tmp_path / "dataset_info.json"), dataset="a"), place="data.eval.1")


@pytest.mark.parametrize(
    ("dataset", "num_rows"),
    [
        ("identity", 91),
        ("alpaca_en_demo", 999),
        ("glaive_toolcall_en_demo", 300),
        ("c4_demo", 300),
        ("wiki_demo", 30),
        ("dpo_en_demo", 300),
        ("kto_en_demo", 300),
    ],
)
def test_the_real_file(shared_data: Path, dataset: str, num_rows: int) -> None:
    path = shared_data / "llamafactory_demo" / "dataset_info.json"
    found = samples(expand(DataSource(path=str(path), dataset=dataset), place="data.train.0"))
    assert len(found) == num_rows
    assert sum(isinstance(one, str) for one in found) <= num_rows // 100
