"""The content of a message as OpenAI's API has it: a text, or a list of text, image and audio parts.

Nothing is fetched: a file comes with the request, and what it claims to be is looked at before any decoder sees it.
Knows no model; what a file holds is decoded in `serving/prompts.py`.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic_core import PydanticCustomError

from rayswift.data.formats import RowError
from rayswift.data.media import MARKS
from rayswift.data.media.columns import data_uri
from rayswift.data.types import Medium

_WEB = ("http://", "https://", "ftp://", "file://")
_IMAGES = "PNG, JPEG, WebP or GIF"
_SOUNDS = ("wav", "mp3")


@dataclass(frozen=True)
class Content:
    """What a message says: its text, in which the mark of `rayswift.data.media` stands for each of its media."""

    text: str
    media: tuple[Medium, ...] = ()


def content_of(value: Any) -> Any:
    """The Content of a text or of a list of parts. Raises PydanticCustomError for anything else."""
    if isinstance(value, Content):
        return value
    if isinstance(value, str):
        return Content(value)
    if not isinstance(value, list):
        _refuse("must be a string or a list of content parts")
    text, media = "", list[Medium]()
    for number, part in enumerate(value):
        found = _part(part, f"part {number}")
        if isinstance(found, Medium):
            media.append(found)
        text += MARKS[found.kind] if isinstance(found, Medium) else found
    return Content(text, tuple(media))


def container_of(content: bytes) -> str | None:
    """Which of the formats that this server takes a sound begins as; None for any other."""
    if content[:4] == b"RIFF" and content[8:12] == b"WAVE":
        return "wav"
    is_mp3 = content[:3] == b"ID3" or (len(content) > 1 and content[0] == 0xFF and content[1] & 0xE0 == 0xE0)
    return "mp3" if is_mp3 else None


def _part(part: Any, place: str) -> str | Medium:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        _refuse("every content part must be an object with a type")
    if part["type"] not in _READERS:
        _refuse(f"{place}: only parts of type {', '.join(_READERS)} are supported, not {part['type'][:40]}")
    if extra := sorted(set(part) - {"type", part["type"]}):
        _refuse(f"{place}: {extra[0][:40]} is not supported in a part of type {part['type']}")
    return _READERS[part["type"]](part.get(part["type"]), place)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        _refuse("a text part must have a text that is a string")
    return value


def _image(value: Any, place: str) -> Medium:
    given = _object(value, place, "image_url", ("url", "detail"))
    if given.get("detail") not in (None, "auto"):
        _refuse(f"{place}: the detail of an image is what the model's processor makes it; leave it out")
    url = given.get("url")
    if not isinstance(url, str):
        _refuse(f"{place}: image_url must have a url that is a string")
    if url[:8].lower().startswith(_WEB):
        _refuse(f"{place}: this server fetches no URL; send the image itself as data:image/png;base64,...")
    if not url.startswith("data:"):
        _refuse(f"{place}: image_url must have a url of the form data:image/png;base64,...")
    try:
        content = data_uri(url)
    except RowError:
        _refuse(f"{place}: the url of the image is not base64: data:image/png;base64,...")
    if not _is_image(content):
        _refuse(f"{place}: the image is not a {_IMAGES} file")
    return Medium("image", content)


def _is_image(content: bytes) -> bool:
    starts = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a")
    return content.startswith(starts) or (content[:4] == b"RIFF" and content[8:12] == b"WEBP")


def _audio(value: Any, place: str) -> Medium:
    given = _object(value, place, "input_audio", ("data", "format"))
    if given.get("format") not in _SOUNDS:
        _refuse(f"{place}: the format of a sound must be {' or '.join(_SOUNDS)}")
    data = given.get("data")
    if not isinstance(data, str):
        _refuse(f"{place}: input_audio must have data that is a string of base64")
    try:
        content = b64decode(data, validate=True)
    except ValueError:
        _refuse(f"{place}: the data of the sound is not base64")
    if container_of(content) != given["format"]:
        _refuse(f"{place}: the sound is not a {given['format']} file")
    return Medium("audio", content)


def _object(value: Any, place: str, name: str, known: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        _refuse(f"{place}: {name} must be an object with {known[0]}")
    if extra := sorted(set(value) - set(known)):
        _refuse(f"{place}: {extra[0][:40]} is not supported in {name}")
    return value


def _refuse(rule: str) -> NoReturn:
    raise PydanticCustomError("content_part", "{rule}", {"rule": rule})


_READERS: dict[str, Callable[[Any, str], str | Medium]] = {"text": _text, "image_url": _image, "input_audio": _audio}
