"""Which files are images, sounds and videos, by the ends of their names, and which columns rows have them in.

Whether such a file can be decoded is known by whoever decodes it.
"""

from __future__ import annotations

MEDIA_ENDINGS = {
    "images": ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm"),
    "audios": ("wav", "flac", "mp3", "ogg", "opus", "m4a", "aac"),
    "videos": ("mp4", "mkv", "webm", "avi", "mov", "mpg", "mpeg"),
}
"""Column -> ends of names, in lower case."""
_COLUMNS = {ending: column for column, endings in MEDIA_ENDINGS.items() for ending in endings}


def media_column(name: str) -> str | None:
    """`images`, `audios` or `videos` for the name of such a file, None for any other."""
    return _COLUMNS.get(name.rpartition(".")[2].lower()) if "." in name else None


def names_for(column: str) -> tuple[str, str]:
    """The two names that rows use for a column of media: `images` and `image`."""
    return column, column.removesuffix("s")
