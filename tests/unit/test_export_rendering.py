"""Tokenizer, template and processor as trained: recorded with a checkpoint, carried on, and held against the base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from rayswift.errors import ExportError
from rayswift.export import pipeline
from rayswift.export.adapter import export_adapter
from rayswift.export.card import CARD
from rayswift.export.written import _COMPANIONS
from rayswift.models.folder import _RENDERING, rendered_otherwise, rendering_sha256
from rayswift.models.loading import _SMALL_FILES
from rayswift.training import checkpoint
from tests.export_cases import export, write_lora_run

TEMPLATE = "chat_template.jinja"


@pytest.fixture
def base(tmp_path: Path, tiny_model_dir: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))


@pytest.fixture
def run(tmp_path: Path, base: Path) -> Path:
    write_lora_run(tmp_path / "runs/lora", base, 0.2)
    return tmp_path / "runs/lora"


def change_template(base: Path) -> None:
    (base / TEMPLATE).write_text((base / TEMPLATE).read_text().replace("assistant\\n", "helper\\n"))


def change_tokenizer(base: Path) -> None:
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))


def add_processor(base: Path) -> None:
    (base / "preprocessor_config.json").write_text('{"do_resize": false}')


@pytest.mark.parametrize(
    ("change", "name"),
    [(change_template, TEMPLATE), (change_tokenizer, "tokenizer.json"), (add_processor, "preprocessor_config.json")],
)
def test_a_base_that_renders_otherwise_than_in_training_is_refused_before_any_work(
    tmp_path: Path, base: Path, run: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], name: str
) -> None:
    export_adapter(str(run), str(tmp_path / "adapter"))
    export(str(run), str(tmp_path / "good"), verify=False)
    export(str(tmp_path / "good"), str(tmp_path / "copy"), verify=False)  # which has the files as trained with
    change(base)
    monkeypatch.setattr(pipeline, "build", lambda *_: pytest.fail("it was built"))
    for source, told in ((run, "step-00000007"), (tmp_path / "adapter", "adapter")):
        rule = rf"model\.path={base} has another {name} than .*{told} was trained with; put the base back as it was"
        with pytest.raises(ExportError, match=rule):
            export(str(source), str(tmp_path / "out"))
    with pytest.raises(ExportError, match=f"has another {name}"):
        export_adapter(str(run), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_is_known_of_training_is_on_the_card_and_what_is_not_is_not(tmp_path: Path, base: Path, run: Path) -> None:
    made = export(str(run), str(tmp_path / "known"))
    assert made.lineage is not None
    assert made.lineage.rendered_with == rendering_sha256(base)
    assert "| renders what was trained on |" in (tmp_path / "known" / CARD).read_text()
    export(str(tmp_path / "known"), str(tmp_path / "again"))
    assert "| renders what was trained on |" in (tmp_path / "again" / CARD).read_text()
    file = run / checkpoint.folder_name(7) / checkpoint.MANIFEST
    record = json.loads(file.read_text())
    del record["rendered_with"]  # of a version that did not say
    file.write_text(json.dumps(record))
    change_template(base)
    assert export(str(run), str(tmp_path / "old")).lineage is not None
    card = (tmp_path / "old" / CARD).read_text()
    assert "renders what the base's renders; whether they were so in training is not known |" in card
    assert "trained on" not in card
    export(str(base), str(tmp_path / "plain"))
    assert "| gives the ids that the base's gives |" in (tmp_path / "plain" / CARD).read_text()


def test_files_laid_out_otherwise_say_the_same(base: Path) -> None:
    before = rendering_sha256(base)
    assert {"tokenizer.json", "tokenizer_config.json", TEMPLATE} <= before.keys()
    for file in base.glob("*.json"):
        said = json.loads(file.read_text())
        file.write_text(json.dumps({"is_local": True} | {key: said[key] for key in reversed(said)}, indent=7))
    (base / "notes.txt").write_text("nothing that rows are rendered with")
    assert rendering_sha256(base) == before
    (base / "added_tokens.json").write_text("no JSON")
    assert rendering_sha256(base).keys() - before.keys() == {"added_tokens.json"}


def test_files_that_nobody_reads_may_come_and_go(base: Path) -> None:
    """Copies, other tools' files in a shared cache, and vocabularies beside a tokenizer.json."""
    before = rendering_sha256(base)
    others = ("tokenizer.json.bak", "tokenizer.model.v3", "tokenizer.tiktoken", "vocab.bpe", "chat_template.old")
    for name in (*others, "old_processor_config.json", "tokenizer.model", "vocab.json"):
        (base / name).write_text(name)
    assert rendered_otherwise(before, base) == []
    after = rendering_sha256(base)
    assert not after.keys() & {*others, "old_processor_config.json"}
    assert rendered_otherwise(before | dict.fromkeys(others, "as an older version wrote down"), base) == []
    (base / "vocab.json").unlink()
    assert rendered_otherwise(after, base) == []
    (base / "tokenizer.model").write_text("which a few tokenizers read beside a tokenizer.json")
    assert rendered_otherwise(after, base) == ["tokenizer.model"]


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "merges.txt"])
def test_a_vocabulary_counts_where_there_is_no_tokenizer_json(base: Path, name: str) -> None:
    fast = rendering_sha256(base)
    (base / "tokenizer.json").unlink()
    (base / name).write_text("a b")
    assert rendered_otherwise(fast, base) == sorted((name, "tokenizer.json"))
    slow = rendering_sha256(base)
    assert rendered_otherwise(slow, base) == []
    (base / name).unlink()
    assert rendered_otherwise(slow, base) == [name]


@pytest.mark.parametrize(
    "name",
    ["tokenizer.4.0.0.json", "tekken.json", "additional_chat_templates/rag.jinja", "video_preprocessor_config.json"],
)
def test_whatever_else_is_read_counts_whether_it_comes_or_goes(base: Path, name: str) -> None:
    before = rendering_sha256(base)
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).write_text("{}")
    assert rendered_otherwise(before, base) == [name]
    after = rendering_sha256(base)
    (base / name).unlink()
    assert rendered_otherwise(after, base) == [name]


def test_every_file_that_counts_is_fetched_and_copied() -> None:
    for name in _RENDERING:
        assert any(fnmatchcase(name, one) for one in _SMALL_FILES), name
        assert any(fnmatchcase(name, one) for one in _COMPANIONS), name
