"""The file of API keys that holds no key: names, sha256 and limits, read, added to and taken from.

Knows files, permissions and the ApiKey. A key is returned once, by `add`; no error shows a key or a hash.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import secrets
import shlex
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from rayswift.config import problems, yamlfile
from rayswift.config.job import Section
from rayswift.errors import ConfigError
from rayswift.locks import taken
from rayswift.models.staging import sync_folder
from rayswift.serving.spec import ApiKey, ApiKeys

T = TypeVar("T", bound=Section)

PREFIX = "rsk-"
_HEAD = re.compile(r"""(?:\s|\#.*\n)*(?:\{\s*)?["']?rayswift_keys["']?\s*:""")
_OTHERS = stat.S_IRGRP | stat.S_IWGRP | stat.S_IROTH | stat.S_IWOTH
_LENT = _OTHERS & ~stat.S_IRGRP
_LOCK_WAIT_S = 10.0


class KeyFile(Section):
    """What such a file holds, as YAML or JSON."""

    rayswift_keys: Literal[1]
    """The version of the format, by which the file is told from one whose lines are keys."""
    keys: ApiKeys
    """The keys, in the order they were added."""


def fingerprint(key: str) -> str:
    """sha256 of a key in hex."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def add(
    file: str,
    name: str,
    *,
    requests_per_minute: int | None = None,
    max_concurrency: int | None = None,
    models: Sequence[str] | None = None,
) -> str:
    """A new key, whose sha256 the file now has; the file is made if there is none.

    Raises ConfigError for a name that is taken, a limit that is none, or a file that cannot be used; it is then as it
    was.
    """
    key = PREFIX + secrets.token_urlsafe(32)
    given = {"requests_per_minute": requests_per_minute, "max_concurrency": max_concurrency, "models": models}
    made = _valid(
        ApiKey,
        {"name": name, "sha256": fingerprint(key), "created": datetime.now(UTC).isoformat(timespec="seconds")}
        | {field: value for field, value in given.items() if value is not None},
        root="key.",
    )
    with _sole_writer(file):
        known = _known(file)
        if name in (one.name for one in known):
            raise ConfigError(
                f"is the name of a key in {file}", path="key.name", value=name,
                fix=f"choose another, or first: rayswift keys revoke {shlex.quote(file)} {name}",
            )  # fmt: skip
        _write(file, (*known, made))
    return key


def revoke(file: str, name: str) -> None:
    """Takes a key out of the file. Raises ConfigError when it has none of that name."""
    read(file)  # a wrong path is told before a lock is made beside it
    with _sole_writer(file):
        known = read(file)
        left = tuple(key for key in known if key.name != name)
        if len(left) == len(known):
            close = difflib.get_close_matches(name, [key.name for key in known], n=1)
            fix = f"did you mean {close[0]}?" if close else f"rayswift keys list {shlex.quote(file)} shows the names"
            raise ConfigError(f"is no key of {file}", path="key.name", value=name, fix=fix)
        _write(file, left)


def line(key: ApiKey) -> str:
    """One line about a key for people, without its hash: `alice  2026-11-25T14:35:54+00:00  60 requests/min  ...`."""
    limits = [
        "" if key.requests_per_minute is None else f"{key.requests_per_minute} requests/min",
        "" if key.max_concurrency is None else f"{key.max_concurrency} at a time",
        "" if key.models is None else f"only {', '.join(key.models)}",
    ]
    told = "  ".join(filter(None, limits)) or "no limits"
    return f"{key.name}  {key.created or 'made at an unknown time'}  {told}"


def read(file: str, field: str = "file") -> tuple[ApiKey, ...]:
    """The keys of a file of this format. Raises ConfigError for any other, and for one that others may read."""
    return parse(*open_text(file, field), file, field)


def parse(text: str, status: os.stat_result, file: str, field: str = "file") -> tuple[ApiKey, ...]:
    """The keys in a file's text. Raises ConfigError, also when the file's permissions let others in."""
    if not holds_hashes(text):
        raise ConfigError("is not a file of `rayswift keys add`", path=field, value=file, fix="give another path")
    if is_open(status):
        raise ConfigError("may be read or written by others", path=field, value=file, fix=how_to_close(file))
    raw, _ = yamlfile.parse(text, file)
    if not isinstance(raw, dict):
        raise ConfigError("is not a mapping of rayswift_keys and keys", path=field, value=file, fix="make it anew")
    return _valid(KeyFile, raw, root="key_file.").keys


def open_text(file: str, field: str = "file") -> tuple[str, os.stat_result]:
    """Text and status of a file of either kind, of the same moment. Raises ConfigError when it cannot be read.

    Of a link the status is that of the file it leads to, as it is of the text.
    """
    try:
        with open(file, encoding="utf-8") as stream:
            return stream.read(), os.fstat(stream.fileno())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot be read: {reason}", path=field, value=file, fix="check the path") from error


def holds_hashes(text: str) -> bool:
    """Whether a file's text is of the format that `add` writes, and not lines that are keys."""
    return _HEAD.match(text) is not None


def is_of_hashes(file: str) -> bool:
    """`holds_hashes` of a file, which may have gone."""
    try:
        return holds_hashes(open_text(file)[0])
    except ConfigError:
        return False


def is_open(status: os.stat_result) -> bool:
    """Whether a file's mode lets its group or others read or write it.

    One of root's that a group may read and nobody else is how a secret is mounted for a process that is not root
    (0440, Kubernetes' fsGroup): who else is in that group is root's choice.
    """
    is_lent = status.st_uid == 0 and os.geteuid() != 0
    return bool(status.st_mode & (_LENT if is_lent else _OTHERS))


def how_to_close(file: str) -> str:
    """The command that keeps others out of a file."""
    return f"chmod go-rwx {shlex.quote(file)}"


def _known(file: str) -> tuple[ApiKey, ...]:
    """The keys of a file that may be missing or empty."""
    if not os.path.exists(file):
        return ()
    text, status = open_text(file)
    return parse(text, status, file) if text.strip() else ()


def _valid(model: type[T], raw: dict[str, Any], *, root: str) -> T:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        found = problems.explain(error, {}, model=model, root=root)
        raise problems.together(found, "the key file" if model is KeyFile else "the key") from None


@contextmanager
def _sole_writer(file: str) -> Iterator[None]:
    """Hold a file against other writers; the lock, a file beside it, ends with the process, however that ends."""
    try:
        lock = os.open(f"{os.path.realpath(file)}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unwritable(file, error) from error
    try:
        _keep_owner(lock, file)
        if not taken(lock, _LOCK_WAIT_S):
            raise ConfigError("is being written by another process", path="file", value=file, fix="try again")
        yield
    finally:
        os.close(lock)


def _write(file: str, keys: tuple[ApiKey, ...]) -> None:
    """Replace the file as a whole, readable by its owner only, who stays who it was."""
    target = Path(os.path.realpath(file))  # of a link what it points to
    plain = {"rayswift_keys": 1, "keys": [key.model_dump(mode="json", exclude_none=True) for key in keys]}
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")  # made with mode 0600
        try:
            with open(handle, "w", encoding="utf-8") as stream:
                _keep_owner(stream.fileno(), file)
                stream.write(yamlfile.dump(plain))
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        sync_folder(target.parent)  # a rename is only on disk when its folder is
    except OSError as error:
        raise _unwritable(file, error) from error


def _keep_owner(handle: int, file: str) -> None:
    """Gives an open file to the owner of `file`, so that root may edit what a service reads and go on sharing it."""
    with suppress(FileNotFoundError):
        owner = os.stat(file)
        if owner.st_uid != os.geteuid():
            try:
                os.fchown(handle, owner.st_uid, owner.st_gid)
            except OSError as error:
                raise _unwritable(file, error) from error


def _unwritable(file: str, error: OSError) -> ConfigError:
    rule = f"cannot be written: {error.strerror}"
    return ConfigError(rule, path="file", value=file, fix="check the path and who may write there")
