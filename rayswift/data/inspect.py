"""A look at the first rows before anything is started: formats, empty data, unusable data. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal

from rayswift.config.job import DataSource, DataSpec
from rayswift.data.detect import detect, load_format, normalise, renamed
from rayswift.data.formats import RowError
from rayswift.data.media import KINDS
from rayswift.data.quarantine import describe
from rayswift.data.rendering import Rendering
from rayswift.data.sources import FileIndex, RawRow, bad_row, index_sources, place_of, read_rows
from rayswift.data.stream import StreamPlan, plan_stream
from rayswift.data.types import BadRow, MediaKind
from rayswift.errors import ConfigError, DataError

PREFLIGHT_ROWS = 100


@dataclass(frozen=True)
class OpenedSources:
    """Sources whose files are indexed and whose first rows were looked at: what a stream is planned over."""

    sources: tuple[DataSource, ...]
    files: tuple[FileIndex, ...]
    formats: tuple[str, ...]
    """Of each source."""
    media_kinds: tuple[MediaKind, ...]

    def stream(self, data: DataSpec, rendering: Rendering, *, epochs: int = 1, seed: int = 0) -> StreamPlan:
        """The stream over all rows as `data` says, its own sources left aside. Raises as `plan_stream`."""
        return plan_stream(
            self.files, self.sources, self.formats,
            data=data, rendering=rendering, epochs=epochs, seed=seed, media_kinds=self.media_kinds,
        )  # fmt: skip


def open_sources(
    sources: Sequence[DataSource],
    *,
    path: str = "data.train",
    kinds: tuple[MediaKind, ...] | Literal["auto"] = "auto",
) -> OpenedSources:
    """The sources, found, indexed and looked at. `path` is what errors call them, `kinds` a `MediaSpec.kinds`.

    Raises as `index_sources`, then as `preflight`.
    """
    files = index_sources(sources, path=path)
    formats = preflight(sources, files, path=path)
    found = media_kinds(sources, files, formats) if kinds == "auto" else kinds
    return OpenedSources(tuple(sources), files, formats, found)


def preflight(
    sources: Sequence[DataSource], files: Sequence[FileIndex], *, path: str = "data.train"
) -> tuple[str, ...]:
    """The format of each source, by its first 100 rows.

    Raises ConfigError for a source without rows or of no known format, DataError when none of these rows can be used.
    """
    return tuple(
        _preflight_source(source, [file for file in files if file.source == number], partial(place_of, path, number))
        for number, source in enumerate(sources)
    )


def media_kinds(
    sources: Sequence[DataSource], files: Sequence[FileIndex], formats: Sequence[str]
) -> tuple[MediaKind, ...]:
    """The kinds of media that the first 100 rows of the sources have."""
    found: set[MediaKind] = set()
    for number, (source, name) in enumerate(zip(sources, formats, strict=True)):
        own = [file for file in files if file.source == number]
        for _, (_, _, row) in islice(_first_rows(own), PREFLIGHT_ROWS):
            with suppress(RowError):
                found |= (
                    {medium.kind for medium in normalise(row, name, source).media} if isinstance(row, dict) else set()
                )
    return tuple(kind for kind in KINDS if kind in found)


def _preflight_source(source: DataSource, files: Sequence[FileIndex], place: Callable[[str], str]) -> str:
    if not any(file.num_rows for file in files):
        raise ConfigError("has no rows", path=place("path"), value=source.path, fix="point it at data that has some")
    rows = list(islice(_first_rows(files), PREFLIGHT_ROWS))
    good = [renamed(row, source) for _, (_, _, row) in rows if isinstance(row, dict)]
    if source.format != "auto":
        load_format(source.format, path=place("format"))
    elif not good:
        raise _unusable([row for _, (_, _, row) in rows if isinstance(row, BadRow)])
    chosen = detect(good, path=place("format")) if source.format == "auto" else source.format
    if source.question is not None and chosen != "captioned":
        raise ConfigError(
            f"is asked of rows of media with a text or label, and these are of the format {chosen}",
            path=place("question"), value=source.question, fix="leave it out",
        )  # fmt: skip
    bad = [fault for file, raw in rows if (fault := _fault(file, raw, chosen, source)) is not None]
    if len(bad) == len(rows):
        raise _unusable(bad)
    return chosen


def _first_rows(files: Sequence[FileIndex]) -> Any:
    return ((file, raw) for file in files for span in file.spans for raw in read_rows(file, span))


def _fault(file: FileIndex, raw: RawRow, format_name: str, source: DataSource) -> BadRow | None:
    row, line, value = raw
    if isinstance(value, BadRow):
        return value
    try:
        normalise(value, format_name, source)
    except RowError as error:
        return bad_row(file, row, line, str(error), str(value))
    return None


def _unusable(bad: Sequence[BadRow]) -> DataError:
    return DataError(f"none of the first {len(bad)} rows can be used: {describe(bad)}; repair the data or set `format`")
