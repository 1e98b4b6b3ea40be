"""What a folder says of its vectors: read as sentence-transformers writes it, old and new, and refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayswift.errors import ConfigError
from rayswift.models.pooling import Pooling, read_pooling
from rayswift.models.remote_code import check_code
from tests.embedding_cases import write_modules


def _folder(path: Path, pooling: dict[str, Any], *, normalize: bool = True, **config: Any) -> str:
    (path / "config.json").write_text(json.dumps({"model_type": "bert"} | config))
    write_modules(path, pooling, normalize=normalize)
    return str(path)


def test_a_folder_without_modules_generates(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert read_pooling(str(tmp_path)) is None
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "x.Transformer", "path": ""}]))
    assert read_pooling(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("pooling", "mode"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_cls_token": True, "include_prompt": True}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "mean", "embedding_dimension": 64}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_each_way_of_pooling(tmp_path: Path, pooling: dict[str, Any], mode: Any, normalize: bool) -> None:
    assert read_pooling(_folder(tmp_path, pooling, normalize=normalize)) == Pooling(mode, normalize)


def test_lengths_and_cuts(tmp_path: Path) -> None:
    folder = _folder(tmp_path, {"pooling_mode": "cls"}, matryoshka_dimensions=[64, 32])
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 7, "do_lower_case": false}')
    assert read_pooling(folder) == Pooling("cls", True, 7, True, (32, 64))
    assert read_pooling(_folder(tmp_path, {"pooling_mode": "cls"}, is_matryoshka=True)) == Pooling("cls", True, 7, True)


@pytest.mark.parametrize(
    ("pooling", "told"),
    [
        ({}, r"has the pooling \(none\)"),
        ({"pooling_mode": "weightedmean"}, "has the pooling weightedmean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, "has the pooling cls and max"),
    ],
)
def test_a_pooling_that_is_not_served_is_named(tmp_path: Path, pooling: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_pooling(_folder(tmp_path, pooling))


@pytest.mark.parametrize(
    ("modules", "told"),
    [
        ([("", "Transformer"), ("1_Pooling", "Pooling"), ("2", "Dense")], "Transformer, Pooling, Dense"),
        ([("0_BERT", "Transformer"), ("1_Pooling", "Pooling")], "a Transformer in the folder itself"),
        ([("", "WordEmbeddings"), ("1_Pooling", "Pooling")], "WordEmbeddings"),
    ],
)
def test_other_modules_are_named(tmp_path: Path, modules: list[tuple[str, str]], told: str) -> None:
    folder = _folder(tmp_path, {"pooling_mode": "mean"})
    listed = [{"type": f"sentence_transformers.models.{kind}", "path": path} for path, kind in modules]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(ConfigError, match=told):
        read_pooling(folder)


@pytest.mark.parametrize("content", ["{", "[1]", '[{"type": "a.Pooling"}]'])
def test_broken_modules_are_told(tmp_path: Path, content: str) -> None:
    folder = _folder(tmp_path, {"pooling_mode": "mean"})
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(ConfigError, match=r"modules\.json"):
        read_pooling(folder)


def test_lower_case_before_the_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path, {"pooling_mode": "mean"})
    (tmp_path / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    with pytest.raises(ConfigError, match="lower-cases texts"):
        read_pooling(folder)


def test_a_list_of_data_sets_beside_the_configs_asks_for_no_code(tmp_path: Path) -> None:
    """As all-MiniLM-L6-v2 has one in its data_config.json."""
    _folder(tmp_path, {"pooling_mode": "mean"})
    (tmp_path / "data_config.json").write_text('[{"name": "a.jsonl", "auto_map": {"x": "y"}}]')
    check_code(tmp_path)
