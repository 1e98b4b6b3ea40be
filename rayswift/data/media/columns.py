"""Where a row names its media: columns beside `<image>` tags, and typed content parts of OpenAI, Anthropic and TRL."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rayswift.data.formats import RowError
from rayswift.data.media import KINDS, MARKS, TAGS
from rayswift.data.types import MediaKind, Medium, Message

_COLUMNS: dict[MediaKind, tuple[str, str]] = {kind: (f"{kind}s", kind) for kind in KINDS}
_PART_KINDS: dict[str, MediaKind] = {
    "image": "image", "image_url": "image", "input_image": "image",
    "audio": "audio", "audio_url": "audio", "input_audio": "audio",
    "video": "video", "video_url": "video",
}  # fmt: skip
COLUMNS = tuple(name for names in _COLUMNS.values() for name in names)
"""Every column that media are named in."""


def part_medium(part: Mapping[str, Any], place: str) -> Medium | None:
    """The medium of a typed content part, None for a part of another type.

    A part that only says `{"type": "image"}` stands for the next image of the row's column: its source is empty.
    """
    kind = _PART_KINDS.get(str(part.get("type")))
    if kind is None:
        return None
    found = next((part[name] for name in (str(part["type"]), kind, f"{kind}_url", "source", "url", "path", "data")
                  if part.get(name) is not None), None)  # fmt: skip
    return Medium(kind, b"") if found is None else Medium(kind, _source(found, place))


def attach(row: Mapping[str, Any], messages: Sequence[Message]) -> list[Message]:
    """The messages with the media of the row's columns at their tags, or before the first question if it has no tags.

    Raises RowError where the tags are more or fewer than the media. A tag in a row without such a column is text.
    """
    _check_marks(messages)
    attached = list(messages)
    if row.keys().isdisjoint(COLUMNS) and not any(message.media for message in messages):
        return attached
    for kind, names in _COLUMNS.items():
        present = [name for name in names if name in row]
        media = [medium for name in present for medium in _column(row[name], kind, name)]
        if present or any(medium.kind == kind for message in messages for medium in message.media):
            attached = _placed(attached, kind, media, tag=TAGS[kind] if present else MARKS[kind])
    return [_in_order(message) if message.media else message for message in attached]


def _check_marks(messages: Sequence[Message]) -> None:
    """Raises RowError for a mark that is no medium's: what people write must not become a picture."""
    for kind, mark in MARKS.items():
        for message in messages:
            if (message.media or mark in message.content) and message.content.count(mark) != _count(message, kind):
                raise RowError("has a character of Unicode's private use area that stands for media here")


def _count(message: Message, kind: MediaKind) -> int:
    return sum(medium.kind == kind for medium in message.media)


def _in_order(message: Message) -> Message:
    """Its media in the order of their marks, across kinds too: a model that reads videos as images mixes the two."""
    left = {kind: iter([medium for medium in message.media if medium.kind == kind]) for kind in KINDS}
    kinds = {mark: kind for kind, mark in MARKS.items()}
    media = (next(left[kinds[letter]]) for letter in message.content if letter in kinds)
    return replace(message, media=tuple(media))


def _placed(messages: Sequence[Message], kind: MediaKind, media: Sequence[Medium], tag: str) -> list[Message]:
    mark = MARKS[kind]
    tags = 0 if tag == mark else sum(message.content.count(tag) for message in messages)
    waiting = sum(medium.kind == kind and not medium.source for message in messages for medium in message.media)
    if media and not tags + waiting:
        return _before_first_question(messages, kind, media)
    if tags + waiting != len(media):
        raise RowError(f"has {tags + waiting} places for {kind}s ({TAGS[kind]}) and {len(media)} {kind}s")
    left = iter(media)
    placed = []
    for message in messages:
        own = iter(medium for medium in message.media if medium.kind == kind)
        content, found = "", []
        for piece, where in _pieces(message.content, tag, mark):
            content += piece + (mark if where else "")
            if where == "tag":
                found.append(next(left))
            elif where == "mark":
                medium = next(own)
                found.append(medium if medium.source else next(left))
        others = tuple(medium for medium in message.media if medium.kind != kind)
        placed.append(replace(message, content=content, media=(*others, *found)) if found else message)
    return placed


def _pieces(text: str, tag: str, mark: str) -> Iterator[tuple[str, str]]:
    """The text between places of media, each with what stands behind it: `tag`, `mark` or nothing."""
    while text:
        places = [
            (place, word, name) for word, name in ((mark, "mark"), (tag, "tag")) if (place := text.find(word)) >= 0
        ]
        if not places:
            yield text, ""
            return
        place, word, name = min(places)
        yield text[:place], name
        text = text[place + len(word) :]


def _before_first_question(messages: Sequence[Message], kind: MediaKind, media: Sequence[Medium]) -> list[Message]:
    first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
    if first is None:
        raise RowError(f"has {kind}s and no question that they could stand before")
    question = messages[first]
    content = MARKS[kind] * len(media) + question.content
    changed = replace(question, content=content, media=(*media, *question.media))
    return [*messages[:first], changed, *messages[first + 1 :]]


def _column(value: Any, kind: MediaKind, name: str) -> list[Medium]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)  # CSV and many Parquet files hold lists so
        except ValueError as error:
            raise RowError(f"`{name}` is text, and not the JSON of a list: {error}") from error
    if value is None or value == "":
        return []
    items = value if isinstance(value, list | tuple) else [value]
    return [Medium(kind, _source(item, f"{name} {number}")) for number, item in enumerate(items, 1)]


def _source(value: Any, place: str) -> str | bytes:
    """A path, URL or data URI, or the bytes of a file; from text, bytes, or the objects of the common formats."""
    if isinstance(value, Mapping):
        if value.get("bytes"):
            return _source(value["bytes"], place)
        encoded = value.get("data")
        if isinstance(encoded, str) and not encoded.startswith("data:"):  # OpenAI's audio, Anthropic's base64 images
            return _decoded(encoded, place)
        value = next((value[name] for name in ("path", "url", "data") if value.get(name)), None)
    if isinstance(value, bytes | bytearray | memoryview) and len(value):
        return bytes(value)
    if isinstance(value, str) and value.strip():
        return value
    raise RowError(f"`{place}` is no path, URL, data URI or bytes of a file")


def _decoded(text: str, place: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError(f"`{place}` is not base64: {error}") from error


def data_uri(uri: str) -> bytes:
    """The bytes of a `data:` URI. Raises RowError for one that is not base64."""
    head, comma, body = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise RowError("has a data URI that is not base64")
    return _decoded(body, "data URI")
