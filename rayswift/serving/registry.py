"""The versions of each model beside their exports: which one is live, which was before, and what happened when.

Knows the file `rayswift-registry.json` and how it is kept whole. Starts and stops nothing.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from socket import gethostname
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rayswift.config import problems
from rayswift.errors import ConfigError
from rayswift.models.staging import sync_folder
from rayswift.serving.owners import Process

FILE = "rayswift-registry.json"
ENDPOINT_FILE = ".rayswift-endpoint.json"
_T = TypeVar("_T", bound=BaseModel)
State = Literal["live", "candidate", "retired", "rolled-back"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Version(_Record):
    """One export that is or was served."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
    folder: str
    """Relative to the registry's folder."""
    created: str
    """When it came in, UTC."""
    state: State
    reason: str | None = None
    """Why it is not live."""


class Event(_Record):
    """Something that happened to a model's versions."""

    time: str
    version: str
    what: str


class ModelVersions(_Record):
    """The versions of one model. Invariant: `live` and `previous` are among them, and one at most is live."""

    versions: tuple[Version, ...] = ()
    live: str | None = None
    previous: str | None = None
    history: tuple[Event, ...] = ()

    @model_validator(mode="after")
    def _agree(self) -> ModelVersions:
        known = [version.id for version in self.versions]
        if len(set(known)) != len(known):
            raise ValueError("has one version twice; remove one of the two")
        for name, wanted in (("live", self.live), ("previous", self.previous)):
            if wanted is not None and wanted not in known:
                raise ValueError(f"{name}={wanted} is not among its versions; name one of {', '.join(known) or 'none'}")
        if any(version.state == "live" and version.id != self.live for version in self.versions):
            raise ValueError(f"has a version in state live beside live={self.live}; make it retired")
        return self

    def get(self, version: str) -> Version:
        """The version of this id."""
        return next(one for one in self.versions if one.id == version)

    def with_state(self, version: str, folder: str, state: State, reason: str | None, now: str) -> ModelVersions:
        """The versions after one of them, known or new, came into a state. A new live one retires the last."""
        old = {one.id: one for one in self.versions}
        created = old[version].created if version in old else now
        live, previous = self.live, self.previous
        if state == "live" and live != version:
            if live is not None:
                old[live] = old[live].model_copy(update={"state": "retired", "reason": f"replaced by {version}"})
            live, previous = version, live
        elif state != "live" and live == version:
            live = None
        old[version] = Version(id=version, folder=folder, created=created, state=state, reason=reason)
        event = Event(time=now, version=version, what=f"{state}: {reason}" if reason else state)
        return ModelVersions(versions=tuple(old.values()), live=live, previous=previous, history=(*self.history, event))


class Registry(_Record):
    """All models whose exports lie in one folder."""

    models: dict[str, ModelVersions] = Field(default_factory=dict)


class EndpointRecord(_Record):
    """Where the endpoint that serves these exports runs. Holds no key."""

    id: str
    """Of the endpoint: at the same address another one may run by now."""
    address: str
    """Of its Ray cluster."""
    token: bool = False
    """Whether that asks for this user's Ray token."""
    url: str
    pid: int
    host: str = ""
    started: int | None = None
    """With `host`, which of all processes of number `pid` it is; see `owners.Process`."""

    @property
    def process(self) -> Process:
        """The one that serves."""
        return Process(self.host or gethostname(), self.pid, self.started)


def read(folder: str | os.PathLike[str]) -> Registry:
    """The registry of a folder of exports; an empty one where there is none yet. Raises ConfigError."""
    return _read(Path(folder) / FILE, Registry) or Registry()


def read_endpoint(folder: str | os.PathLike[str]) -> EndpointRecord | None:
    """The endpoint that was started for these exports, whether it still runs or not. Raises ConfigError."""
    return _read(Path(folder) / ENDPOINT_FILE, EndpointRecord)


def _read(file: Path, kind: type[_T]) -> _T | None:
    try:
        return kind.model_validate_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        raise problems.together(problems.explain(error, {}, model=kind, root=f"{file.name}:"), str(file)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", path="registry", value=str(file), fix="check the file") from error


def write_endpoint(folder: str | os.PathLike[str], record: EndpointRecord) -> None:
    """Say where the endpoint of these exports runs, to this user only."""
    _write(Path(folder) / ENDPOINT_FILE, record, 0o600)


def stale_owner(folder: str | os.PathLike[str], mine: EndpointRecord) -> EndpointRecord | None:
    """The endpoint that has kept its versions here and does not run any more; the caller holds the lock.

    Raises ConfigError while another one does, or may: its promotions would look for it, and find this one.
    """
    known = read_endpoint(folder)
    if known is None or known.id == mine.id:
        return None
    if mine.address == known.address or mine.process == known.process:
        return known  # on one cluster, and in one process, there is one endpoint
    runs = known.process.runs(known.address)
    if runs is False:
        return known
    untold = "" if runs else f", and {known.address} does not tell from here whether it runs"
    raise ConfigError(
        f"keeps the versions of another endpoint{' that runs' if runs else ''}, the one at {known.url} (process "
        f"{known.pid} of {known.process.host}){untold}", path="registry", value=str(Path(folder) / FILE),
        fix=f"stop that one, serve from another folder, or remove {Path(folder) / ENDPOINT_FILE} where it is gone",
    )  # fmt: skip


def forget_endpoint(folder: str | os.PathLike[str], endpoint: str) -> None:
    """Take back what the endpoint of this id wrote."""
    with suppress(ConfigError, FileNotFoundError):
        record = read_endpoint(folder)
        if record is not None and record.id == endpoint:
            (Path(folder) / ENDPOINT_FILE).unlink()


@contextmanager
def announced(served: Mapping[str, tuple[str, str]], endpoint: EndpointRecord) -> Iterator[None]:
    """For the duration, the folders of exports say where they are served; model -> (version, its export), all live.

    Raises ConfigError for a folder that cannot be written to, whose versions are being changed, or that has another
    endpoint.
    """
    homes = {model: Path(export).resolve().parent for model, (_, export) in served.items()}
    try:
        for model, (version, export) in served.items():
            with locked(homes[model]):
                stale_owner(homes[model], endpoint)
                if read(homes[model]).models.get(model, ModelVersions()).live != version:
                    record(homes[model], model, version, export, "live", "served from the start of the endpoint")
                write_endpoint(homes[model], endpoint)
        yield
    finally:
        for home in set(homes.values()):
            forget_endpoint(home, endpoint.id)


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """The only one that changes versions of this folder for the duration. Raises ConfigError when another one does."""
    file = Path(folder) / f"{FILE}.lock"
    with _open_lock(file) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                "is being changed by another promotion or rollback", path="registry", value=str(Path(folder) / FILE),
                fix="wait until it has ended, or stop it",
            ) from None  # fmt: skip
        yield


@contextmanager
def _open_lock(file: Path) -> Iterator[int]:
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"cannot be written: {error.strerror}", path="registry", value=str(file), fix="check the folder"
        ) from error
    try:
        yield handle
    finally:
        os.close(handle)


def record(
    folder: str | os.PathLike[str],
    model: str,
    version: str,
    export: str | os.PathLike[str],
    state: State,
    reason: str | None = None,
) -> ModelVersions:
    """The versions of a model after one came into a state, written. The caller holds the lock."""
    registry, now = read(folder), datetime.now(UTC).isoformat(timespec="seconds")
    relative = os.path.relpath(Path(export).resolve(), Path(folder).resolve())
    changed = registry.models.get(model, ModelVersions()).with_state(version, relative, state, reason, now)
    _write(Path(folder) / FILE, Registry(models={**registry.models, model: changed}), 0o644)
    return changed


def _write(file: Path, content: BaseModel, mode: int) -> None:
    try:
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with open(handle, "w", encoding="utf-8") as stream:
                stream.write(content.model_dump_json(indent=2) + "\n")
                stream.flush()
                os.fchmod(stream.fileno(), mode)
                os.fsync(stream.fileno())
            os.replace(temporary, file)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        sync_folder(file.parent)
    except OSError as error:
        raise ConfigError(
            f"cannot be written: {error.strerror}", path="registry", value=str(file), fix="check who may write there"
        ) from error


def home_of(export: str) -> str:
    """The folder that an export lies in, where its registry is; of a link to an export, that of the export."""
    return os.path.dirname(os.path.realpath(export))
