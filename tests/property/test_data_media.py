"""Whatever a row writes: media come in the order of their places, as many as there are, and never from its text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayswift.config.job import DataSource, MediaSpec
from rayswift.data.detect import normalise
from rayswift.data.formats import RowError
from rayswift.data.media import KINDS, MARKS, TAGS
from rayswift.data.media.reading import _place
from rayswift.data.types import Medium, Sample

_WORDS = st.text(alphabet="ab <>/image", max_size=6).filter(lambda word: not any(tag in word for tag in TAGS.values()))
_PIECES = st.lists(st.one_of(st.sampled_from(KINDS), _WORDS), max_size=6)
_ROW = st.lists(_PIECES, min_size=1, max_size=3)


def _sample(row: dict[str, Any]) -> Sample:
    return normalise(row, "messages", DataSource(path="x.jsonl"))


def _turns(contents: list[Any]) -> list[dict[str, Any]]:
    questions = [{"role": "user", "content": content} for content in contents]
    answer = {"role": "assistant", "content": "ok"}
    return [turn for question in questions for turn in (question, answer)]


def _named(pieces: list[list[str]]) -> list[list[tuple[str, str]]]:
    """Each piece with the name of its medium, numbered over the row; words have none."""
    count = iter(range(1000))
    return [[(piece, f"{piece}-{next(count)}" if piece in KINDS else "") for piece in turn] for turn in pieces]


def _check(sample: Sample, named: list[list[tuple[str, str]]]) -> None:
    for message, turn in zip(sample.messages[::2], named, strict=True):
        assert message.content == "".join(MARKS[piece] if name else piece for piece, name in turn)
        assert list(message.media) == [Medium(piece, name) for piece, name in turn if name]


def _joins_to_a_tag(pieces: list[list[str]]) -> bool:
    """Whether words next to one another happen to make a tag."""
    texts = ["".join(TAGS.get(piece, piece) for piece in turn) for turn in pieces]
    return any(
        sum(text.count(TAGS[kind]) for text in texts) != sum(turn.count(kind) for turn in pieces) for kind in KINDS
    )


@given(_ROW)
def test_media_of_columns_come_in_the_order_of_the_tags(pieces: list[list[str]]) -> None:
    named = _named(pieces)
    if _joins_to_a_tag(pieces):
        return
    contents = ["".join(TAGS[piece] if name else piece for piece, name in turn) for turn in named]
    columns = {f"{kind}s": [name for turn in named for piece, name in turn if piece == kind] for kind in KINDS}
    _check(_sample({"messages": _turns(contents), **columns}), named)


@given(_ROW, st.data())
def test_media_of_parts_come_in_their_order_whether_named_there_or_in_a_column(
    pieces: list[list[str]], data: st.DataObject
) -> None:
    named = _named(pieces)
    columns: dict[str, list[str]] = {f"{kind}s": [] for kind in KINDS}
    contents = []
    for turn in named:
        parts: list[dict[str, str]] = []
        for piece, name in turn:
            if name and data.draw(st.booleans()):
                parts.append({"type": piece, piece: name})
            elif name:
                parts.append({"type": piece})
                columns[f"{piece}s"].append(name)
            else:
                parts.append({"type": "text", "text": piece})
        contents.append(parts)
    if not _joins_to_a_tag([[piece for piece in turn if piece not in KINDS] for turn in pieces]):
        _check(_sample({"messages": _turns(contents), **columns}), named)


@given(_ROW, st.dictionaries(st.sampled_from(KINDS), st.integers(0, 4)))
def test_the_numbers_match_or_the_row_is_refused(pieces: list[list[str]], given_media: dict[str, int]) -> None:
    contents = ["".join(TAGS.get(piece, piece) for piece in turn) for turn in pieces]
    row = {f"{kind}s": [f"{kind}-{i}" for i in range(count)] for kind, count in given_media.items()}
    tags = {kind: sum(content.count(TAGS[kind]) for content in contents) for kind in KINDS}
    try:
        sample = _sample({"messages": _turns(contents), **row})
    except RowError:
        refused = True
    else:
        refused = False
    if refused:
        assert any(tags[kind] != count for kind, count in given_media.items())
        return
    for kind in KINDS:
        count = given_media.get(kind, 0)
        assert sum(medium.kind == kind for medium in sample.media) == count
        assert sum(message.content.count(MARKS[kind]) for message in sample.messages) == count
        assert count == 0 or tags[kind] in (0, count)
    for message in sample.messages:
        marks = [letter for letter in message.content if letter in MARKS.values()]
        assert marks == [MARKS[medium.kind] for medium in message.media]


@given(
    st.lists(st.sampled_from([*MARKS.values(), "a", "<image>"]), max_size=5).map("".join), st.booleans(), st.booleans()
)
def test_marks_never_come_from_text(written: str, as_part: bool, with_image: bool) -> None:
    content: Any = [{"type": "text", "text": written}] if as_part else written
    row: dict[str, Any] = {"messages": _turns([content])} | ({"images": ["a"]} if with_image else {})
    if any(mark in written for mark in MARKS.values()):
        with pytest.raises(RowError, match="private use area"):
            _sample(row)


_STEPS = st.lists(st.sampled_from(["..", ".", "a", "b", "%2e%2e", "", "c.png"]), min_size=1, max_size=6)


@given(_STEPS, st.sampled_from(["/top/data", "memory://top/data", "http://host/top/data"]))
def test_no_chain_of_steps_leads_out(steps: list[str], folder: str) -> None:
    try:
        place = _place("/".join(steps), folder, MediaSpec())
    except RowError:
        return
    assert place.startswith(f"{folder}/")
    depth = 0
    for step in place.removeprefix(f"{folder}/").replace("%2e%2e", ".." if "://" in folder else "x").split("/"):
        depth += {"..": -1, ".": 0, "": 0}.get(step, 1)
        assert depth >= 0, place
