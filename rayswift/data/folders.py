"""Folders of media, as Hugging Face's image and audio folders are laid out: described by a metadata file, or by labels.

`metadata.jsonl`, `.csv` or `.parquet` has a row per file, whose `file_name` (also `x_file_name`, and lists in
`file_names`) is a path that starts where the metadata file lies. Without one, the folder that a file lies in is its
label. Paths are handed on as they are written; whether one may be opened is known by whoever opens it.
"""

from __future__ import annotations

from typing import Any

from rayswift.data.file_kinds import MEDIA_ENDINGS, media_column
from rayswift.data.paths import file_name, files_below

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_ENDINGS = tuple(f".{ending}" for endings in MEDIA_ENDINGS.values() for ending in endings)


def media_files(folder: str) -> list[tuple[str, int]]:
    """The images, sounds and videos below a folder: sorted paths that start there, and sizes. Hidden ones are none."""
    return files_below(folder, _ENDINGS)


def label_of(name: str) -> str | None:
    """The name of the folder that a file lies in, by its path below the folder that was named; None without one."""
    return name.split("/")[-2] if "/" in name else None


def is_metadata(path: str) -> bool:
    """Whether the rows of a file describe the files beside it, by its name."""
    return file_name(path).rpartition("/")[2] in _METADATA


def with_media(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a metadata file with `images`, `audios`, `videos` in place of the columns that name such files."""
    media: dict[str, list[str]] = {}
    kept: dict[str, Any] = {}
    for column, value in row.items():
        names = _names(column, value)
        kinds = [media_column(name) for name in names]
        if not names or None in kinds:
            kept[column] = value
            continue
        for name, kind in zip(names, kinds, strict=True):
            media.setdefault(str(kind), []).append(name)
    return {column: value for column, value in kept.items() if column not in media} | media


def _names(column: str, value: Any) -> list[str]:
    """The file names in a column of one or several; none in any other."""
    if isinstance(value, str) and (column == "file_name" or column.endswith("_file_name")):
        return [value]
    several = column == "file_names" or column.endswith("_file_names")
    return value if several and isinstance(value, list) and all(isinstance(name, str) for name in value) else []
