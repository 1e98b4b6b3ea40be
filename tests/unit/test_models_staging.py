"""A staged folder appears whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rayswift.models.staging import staged_folder


def test_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "deep" / "new") as stage:
        (stage / "a").write_text("1")
        assert not (tmp_path / "deep" / "new").exists()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["new"]
    assert (tmp_path / "deep" / "new" / "a").read_text() == "1"


def test_nothing_is_left_when_the_block_raises(tmp_path: Path) -> None:
    def interrupted() -> None:
        with staged_folder(tmp_path / "new") as stage:
            (stage / "a").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_existing_folder_is_kept_unless_replaced(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "a").write_text("old")
    with pytest.raises(FileExistsError), staged_folder(old):
        pass
    with pytest.raises(ValueError, match="no"), staged_folder(old, replace=True):
        raise ValueError("no")
    assert (old / "a").read_text() == "old"
    with staged_folder(old, replace=True) as stage:
        (stage / "b").write_text("new")
    assert [p.name for p in old.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_old_folder_is_put_back_when_the_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "a").write_text("old")
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if str(source).endswith(".staged"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="Input/output"), staged_folder(old, replace=True):
        pass
    assert (old / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
