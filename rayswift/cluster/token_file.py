"""This user's Ray token: whoever reads it runs code as this user, on every cluster that asks for it.

Ray writes the file that keeps it for the whole machine to read. (ray 2.60) Knows files; does not speak to Ray.
"""

from __future__ import annotations

import os
import secrets
import stat
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from rayswift.errors import ConfigError

_VARIABLE, _PATH_VARIABLE = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_SET_VARIABLE = f"set {_VARIABLE} to: python -c 'import secrets; print(secrets.token_hex(32))'"
_NUM_BYTES = 32  # as many as Ray's own have, in hex


def keep_private(environ: Mapping[str, str] | None = None) -> None:
    """Have a token that its owner alone reads, before Ray makes one: a new file, or an open one of ours closed.

    What others could read so far is told, and so is what is not ours to close. Nothing is done where the token comes
    by RAY_AUTH_TOKEN. Raises ConfigError when no file can be written, or there is no home for it.
    """
    environ = os.environ if environ is None else environ
    if environ.get(_VARIABLE):
        return
    if given := environ.get(_PATH_VARIABLE):
        with suppress(OSError):  # a path without a token is Ray's to refuse
            _tell_of_open(given, os.stat(given))
        return
    path = _home() / ".ray" / "auth_token"
    try:
        if not path.exists() or not path.stat().st_size:
            _write(path)
        _close(path)
    except OSError as error:
        raise ConfigError(
            f"cannot be kept for its owner alone: {error.strerror}", path=str(path),
            fix=f"make it writable, or {_SET_VARIABLE}",
        ) from error  # fmt: skip


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:  # a container that runs as a number nobody wrote down
        raise ConfigError(
            "is not set, and this user has no other home: Ray's token has no place", path="HOME",
            fix=f"set it to a folder that can be written to, or {_SET_VARIABLE}",
        ) from error  # fmt: skip


def _write(path: Path) -> None:
    """A new token, in its place at once and whole: two that start together have the same."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists():
        path.unlink()  # empty, which Ray takes for none
    token = secrets.token_hex(_NUM_BYTES)
    written = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        _create(written, token)
        try:
            os.link(written, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links: not at once, but no other's is overwritten either
            with suppress(FileExistsError):
                _create(path, token)
    finally:
        written.unlink(missing_ok=True)


def _create(path: Path, content: str) -> None:
    """Raises OSError where there is one already."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(content)


def _close(path: Path) -> None:
    status = path.stat()
    if status.st_uid != os.getuid():
        _note(f"{path} belongs to another user, who can use every cluster that asks for its token; {_anew(path)}")
    elif _is_open(status):
        with suppress(OSError):  # mounted for reading alone, as secrets are
            path.chmod(0o600)
        if _is_open(path.stat()):  # some file systems have no modes, and take any
            _note(f"{path} cannot be closed to other users, who can run code as you where they read it; give it the "
                  f"mode 600 where it is mounted, or {_SET_VARIABLE}")  # fmt: skip
        else:
            _note(f"other users could read {path} until now, and run code as you with it; it is closed. {_anew(path)}")


def _is_open(status: os.stat_result) -> bool:
    """Whether others than the owner may do anything with the file."""
    return bool(stat.S_IMODE(status.st_mode) & 0o077)


def _tell_of_open(path: str, status: os.stat_result) -> None:
    if _is_open(status):
        _note(f"{_PATH_VARIABLE}={path} is a file that other users can read or write, and run code as you with it; "
              f"close it (chmod 600 {path}) and put another token into it")  # fmt: skip
    elif status.st_uid != os.getuid():
        _note(f"{_PATH_VARIABLE}={path} belongs to another user, who can use every cluster that asks for its token")


def _anew(path: Path) -> str:
    return f"For a new token end the clusters that ask for this one and remove the file: rm {path}"


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
