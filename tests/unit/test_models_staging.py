"""A staged folder appears whole or not at all."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayswift.errors import ExportError, RaySwiftError
from rayswift.models import staging
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


def _left(name: str) -> str:
    """What a process of this machine stages a folder as."""
    return f".{name}.1-{staging._machine()}-0123abcd.staged"


_KILLED = """
import os, signal, sys
from rayswift.models.staging import staged_folder
rename = os.rename
def dies(source, target):
    rename(source, target)
    if str(target).endswith(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
os.rename = dies
with staged_folder(sys.argv[1], replace=True) as stage:
    (stage / "b").write_text("half")
    if sys.argv[2] == "early":
        os.kill(os.getpid(), signal.SIGKILL)
    (stage / "b").write_text("whole")
"""


@pytest.mark.parametrize(
    ("dies", "reads"),
    [("early", ("a", "old")), (".replaced", ("a", "old")), ("place", ("b", "whole"))],
    ids=["while it is written", "between the renames", "after them"],
)
def test_what_a_killed_process_left_goes_with_the_next(tmp_path: Path, dies: str, reads: tuple[str, str]) -> None:
    """Wherever it was killed, the next one finds a whole folder, the old or the new, and leaves nothing but its own."""
    place, other = tmp_path / "place", tmp_path / ".place.x.staged"
    for folder in (place, other):
        folder.mkdir()
    (place / "a").write_text("old")
    done = subprocess.run([sys.executable, "-c", _KILLED, str(place), dies], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) > 2 or dies == "early"
    seen: list[tuple[str, str]] = []
    with staged_folder(place, replace=True) as stage:
        seen = [(file.name, file.read_text()) for file in place.iterdir()]
        assert {entry.name for entry in tmp_path.iterdir()} == {"place", other.name, stage.name}
        (stage / "c").write_text("newest")
    assert seen == [reads]
    assert {entry.name for entry in tmp_path.iterdir()} == {"place", other.name}
    assert [file.name for file in place.iterdir()] == ["c"]


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "new") as mine:
        (mine / "a").write_text("1")
        hers = mine.rename(tmp_path / _left("new"))  # as another process would have it, whose lock is this one's
        with staged_folder(tmp_path / "new") as stage:
            assert (hers / "a").read_text() == "1"
            assert stage != hers
        (tmp_path / "new").rename(tmp_path / "second")
        hers.rename(mine)
    assert (tmp_path / "new/a").read_text() == "1"


def test_processes_with_the_same_id_have_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of two containers, or of two machines that share a disk, may have."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with staged_folder(tmp_path / "new", replace=True) as first:
        (first / "a").write_text("1")
        with staged_folder(tmp_path / "new") as second:
            (second / "b").write_text("2")
            assert (first / "a").read_text() == "1"
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("when", ["before it is opened", "before it is locked", "while it would be locked"])
def test_a_new_folder_that_another_sweeps_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Between its making and its lock another process takes it for one that a killed process left."""
    made = swept_once(monkeypatch, when)
    with staged_folder(tmp_path / "new") as stage:
        assert [one == stage for one in made] == [False, True]
        (stage / "a").write_text("1")
    assert (tmp_path / "new/a").read_text() == "1"


def swept_once(monkeypatch: pytest.MonkeyPatch, when: str) -> list[Path]:
    """The stages that are made, of which the first is swept."""
    made: list[Path] = []
    mkdir, taken = Path.mkdir, staging.taken

    def making(path: Path, *args: Any, **kwargs: Any) -> None:
        mkdir(path, *args, **kwargs)
        if path.suffix == ".staged":
            made.append(path)
            if when == "before it is opened" and len(made) == 1:
                path.rmdir()

    def taking(file: int, wait_s: float) -> bool:
        if when == "before it is opened" or len(made) != 1:
            return taken(file, wait_s)
        if when == "before it is locked":
            made[0].rmdir()
        return when == "before it is locked" and taken(file, wait_s)

    monkeypatch.setattr(Path, "mkdir", making)
    monkeypatch.setattr(staging, "taken", taking)
    return made


def test_who_sweeps_every_new_folder_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "taken", lambda *_: False)
    with pytest.raises(OSError, match=r"none of 10 new folders beside .*new was left"), staged_folder(tmp_path / "new"):
        pytest.fail("it was written to")


def test_a_file_system_without_locks_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> bool:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(staging, "taken", none)
    left = tmp_path / _left("new")
    left.mkdir()
    with staged_folder(tmp_path / "new") as stage:
        (stage / "a").write_text("1")
    assert (tmp_path / "new/a").read_text() == "1"
    assert left.exists()


@pytest.mark.parametrize("name", [".new.1.staged", ".new.1-0123abcd-0123abcd.staged"])
def test_what_another_machine_writes_is_left_alone(tmp_path: Path, name: str) -> None:
    """On a disk of both: its lock is not seen here."""
    (tmp_path / name).mkdir()
    ours = tmp_path / _left("new")
    ours.mkdir()
    with staged_folder(tmp_path / "new"):
        assert (tmp_path / name).exists()
        assert not ours.exists()


def kept_of(error: RaySwiftError, place: Path) -> Path:
    """The finished folder that a refusal names."""
    found = re.fullmatch(rf"folder={place} .*; what was made is whole and stays in (\S+)", str(error))
    assert found
    return Path(found[1])


def comes(place: Path, what: str) -> None:
    if what == "file":
        place.write_text("hers")
    elif what == "link":
        place.symlink_to(place.parent / "nowhere")
    else:
        place.mkdir()
        (place / "thesis").write_text("years")


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_what_came_while_it_was_made_is_not_touched_and_nothing_made_is_lost(tmp_path: Path, what: str) -> None:
    place = tmp_path / "new"

    def made() -> None:
        with staged_folder(place) as stage:
            (stage / "a").write_text("1")
            comes(place, what)

    with pytest.raises(RaySwiftError, match="has come there while this was made, and is not replaced") as caught:
        made()
    assert {"folder": place.is_dir(), "file": place.is_file(), "link": place.is_symlink()}[what]
    assert what != "folder" or [file.name for file in place.iterdir()] == ["thesis"]
    kept = kept_of(caught.value, place)
    assert {entry.name for entry in tmp_path.iterdir()} == {"new", kept.name}
    assert (kept / "a").read_text() == "1"
    if what == "folder":
        with staged_folder(place, replace=True) as stage:  # what it sweeps is not the folder that was kept
            (stage / "b").write_text("2")
        assert (kept / "a").read_text() == "1"


def test_an_empty_folder_that_came_is_taken(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "new") as stage:
        (stage / "a").write_text("1")
        (tmp_path / "new").mkdir()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["new"]


def test_of_two_that_make_the_same_folder_both_keep_their_work(tmp_path: Path) -> None:
    place = tmp_path / "new"

    def both() -> None:
        with staged_folder(place) as first:
            (first / "a").write_text("1")
            with staged_folder(place) as second:
                (second / "b").write_text("2")

    with pytest.raises(RaySwiftError) as caught:
        both()
    assert (place / "b").read_text() == "2"
    assert (kept_of(caught.value, place) / "a").read_text() == "1"


def test_what_may_be_replaced_is_looked_at_again_at_the_end(tmp_path: Path) -> None:
    place = tmp_path / "old"
    place.mkdir()
    (place / "export").write_text("old")

    def check(folder: str) -> None:
        if not (Path(folder) / "export").exists():
            raise ExportError("is no export")

    def made(what: str) -> None:
        with staged_folder(place, replace=True, check=check) as stage:
            (stage / "export").write_text("new")
            if what == "thesis":
                (place / "export").rename(place / what)

    made("nothing")
    assert (place / "export").read_text() == "new"
    with pytest.raises(RaySwiftError, match="is not replaced: is no export; what was made") as caught:
        made("thesis")
    assert [file.name for file in place.iterdir()] == ["thesis"]
    assert (kept_of(caught.value, place) / "export").read_text() == "new"


def test_two_that_replace_the_same_folder_at_once_lose_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one moves the old folder first, and puts its own there before this one's is renamed."""
    place, rename = tmp_path / "old", os.rename
    comes(place, "folder")

    def raced(source: Path, target: Path) -> None:
        if str(target).endswith(".replaced"):
            monkeypatch.setattr(os, "rename", rename)
            rename(source, tmp_path / "hers")
            place.mkdir()
            (place / "b").write_text("2")
            raise FileNotFoundError(2, "No such file or directory")
        rename(source, target)

    def made() -> None:
        with staged_folder(place, replace=True) as stage:
            (stage / "a").write_text("1")
            monkeypatch.setattr(os, "rename", raced)

    with pytest.raises(RaySwiftError) as caught:
        made()
    assert (place / "b").read_text() == "2"
    assert (kept_of(caught.value, place) / "a").read_text() == "1"
