"""The Ray token is its owner's alone, before any cluster asks for it, and a cluster started here always asks."""

from __future__ import annotations

import errno
import os
import pwd
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rayswift.cluster import session, token_file
from rayswift.errors import ConfigError

_START = """
import os, subprocess, sys
import ray
from rayswift.cluster.session import is_token_asked, session
with session():
    print(ray.is_initialized() and is_token_asked(), flush=True)
    address = ray.get_runtime_context().gcs_address
    subprocess.run([sys.executable, "-c", sys.argv[1], address], env=os.environ | {"RAY_AUTH_MODE": "disabled"})
"""
_JOIN = """
import sys
import ray
from rayswift.cluster.session import session
with session(sys.argv[1], token=True):
    print("joined", len(ray.nodes()))
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The home of a user without a token, under the umask that most have."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = os.umask(0o022)
    yield tmp_path
    os.umask(before)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_token_is_its_owners_alone(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token_file.keep_private()
    made = home / ".ray/auth_token"
    assert (_mode(home / ".ray"), _mode(made)) == (0o700, 0o600)
    first = made.read_text()
    assert len(bytes.fromhex(first)) == 32
    token_file.keep_private()
    assert made.read_text() == first
    assert [path.name for path in made.parent.iterdir()] == ["auth_token"]
    assert not capsys.readouterr().err


def test_a_token_that_others_could_read_is_closed_and_told(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = home / ".ray/auth_token"
    made.parent.mkdir()
    made.write_text("a" * 64)
    token_file.keep_private()
    assert (_mode(made), made.read_text()) == (0o600, "a" * 64)
    told = capsys.readouterr().err
    assert f"other users could read {made}" in told
    assert f"rm {made}" in told
    assert "aaaa" not in told
    token_file.keep_private()
    assert not capsys.readouterr().err


def test_an_empty_file_is_no_token(home: Path) -> None:
    made = home / ".ray/auth_token"
    made.parent.mkdir()
    made.touch()
    token_file.keep_private()
    assert (_mode(made), len(made.read_text())) == (0o600, 64)


def test_what_is_not_ours_to_close_is_told(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = os.getuid()
    token_file.keep_private()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    token_file.keep_private()
    assert "belongs to another user" in capsys.readouterr().err
    monkeypatch.setattr(os, "getuid", lambda: mine)
    named = home / "token"
    named.write_text("b" * 64)
    token_file.keep_private({"RAY_AUTH_TOKEN_PATH": str(named)})
    assert _mode(named) == 0o644
    assert f"chmod 600 {named}" in capsys.readouterr().err
    named.chmod(0o600)
    token_file.keep_private({"RAY_AUTH_TOKEN_PATH": str(named)})
    token_file.keep_private({"RAY_AUTH_TOKEN_PATH": str(home / "absent")})
    assert not capsys.readouterr().err


def test_a_token_of_the_environment_needs_no_file(home: Path) -> None:
    token_file.keep_private({"RAY_AUTH_TOKEN": "c" * 64})
    assert not (home / ".ray").exists()


def test_a_home_that_takes_no_file_is_told(home: Path) -> None:
    (home / ".ray").write_text("a file")
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN"):
        token_file.keep_private()


def test_a_user_without_a_home_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", _raise(KeyError("uid not found")))
    with pytest.raises(ConfigError, match=r"HOME is not set.*; set it to a folder .* or set RAY_AUTH_TOKEN to"):
        token_file.keep_private()


def test_a_home_without_hard_links_keeps_a_token(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", _raise(PermissionError(errno.EPERM, "Operation not permitted")))
    token_file.keep_private()
    made = home / ".ray/auth_token"
    assert (_mode(made), len(made.read_text())) == (0o600, 64)
    assert [path.name for path in made.parent.iterdir()] == ["auth_token"]

    def link(_: Path, path: Path) -> None:  # another process was first
        path.write_text("d" * 64)
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    made.unlink()
    monkeypatch.setattr(os, "link", link)
    token_file.keep_private()
    assert made.read_text() == "d" * 64


@pytest.mark.parametrize("is_refused", [True, False], ids=["mounted for reading", "no modes"])
def test_a_token_that_cannot_be_closed_is_told(
    is_refused: bool, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = home / ".ray/auth_token"
    made.parent.mkdir()
    made.write_text("e" * 64)
    refusal = _raise(OSError(errno.EROFS, "Read-only file system"))
    monkeypatch.setattr(Path, "chmod", refusal if is_refused else lambda *_: None)
    token_file.keep_private()
    told = capsys.readouterr().err
    assert f"{made} cannot be closed to other users" in told
    assert "it is closed" not in told
    assert made.read_text() == "e" * 64


def _raise(error: Exception) -> Callable[..., None]:
    def raising(*_: object, **__: object) -> None:
        raise error

    return raising


@pytest.mark.parametrize("mode", ["disabled", "DISABLED"])
def test_a_cluster_of_our_own_asks_for_the_token_whatever_is_set(
    mode: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    started: list[str] = []
    monkeypatch.setattr(session, "_init_local", lambda folder, _: started.append(os.environ["RAY_AUTH_MODE"]))
    monkeypatch.setattr(session, "make_folder", lambda *, haproxy: str(home / "session"))
    session._start_local()
    assert started == ["token"]
    assert _mode(home / ".ray/auth_token") == 0o600
    assert f"RAY_AUTH_MODE={mode} is not followed" in capsys.readouterr().err


@pytest.mark.parametrize("mode", [None, "disabled", "Token"])
def test_a_cluster_that_is_known_to_ask_is_sent_the_token_whatever_is_set(
    mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "")  # put back afterwards, whatever becomes of it
    os.environ.pop("RAY_AUTH_MODE") if mode is None else monkeypatch.setenv("RAY_AUTH_MODE", mode)
    modes: list[str] = []
    monkeypatch.setattr(session, "_join", lambda _: modes.append(os.environ["RAY_AUTH_MODE"]))
    with session.session("10.0.0.1:6379", token=True):
        assert session.is_token_asked()
    assert modes == ["Token" if mode == "Token" else "token"]


def test_a_mode_that_asks_is_left_as_it_is(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "Token")  # as Ray reads it
    session._ask_for_token()
    assert session.is_token_asked()
    assert os.environ["RAY_AUTH_MODE"] == "Token"
    assert not capsys.readouterr().err


@pytest.mark.ray
def test_a_started_cluster_has_made_no_open_token(home: Path) -> None:
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    environment = {name: value for name, value in os.environ.items() if name not in names} | {"RAYSWIFT_TMPDIR": "/tmp"}
    done = subprocess.run([sys.executable, "-c", _START, _JOIN], env=environment | {"RAY_AUTH_MODE": "disabled"},
                          text=True, capture_output=True, timeout=180, check=False)  # fmt: skip
    assert done.stdout.split("\n") == ["True", "joined 1", ""], done.stderr
    assert _mode(home / ".ray/auth_token") == 0o600
