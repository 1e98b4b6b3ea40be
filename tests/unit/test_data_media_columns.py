"""Media of a row: columns beside tags, typed parts of each dialect, and the order in which they come out."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from rayswift.config.job import DataSource
from rayswift.data.detect import detect, normalise
from rayswift.data.formats import RowError
from rayswift.data.media import MARKS
from rayswift.data.types import Medium, Message, Sample

IMAGE, AUDIO, VIDEO = MARKS["image"], MARKS["audio"], MARKS["video"]
PNG = b"\x89PNG of a kind"
BASE64 = base64.b64encode(PNG).decode()


def turns(*contents: Any) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def messages(*contents: Any, **row: Any) -> tuple[Message, ...]:
    return sample({"messages": turns(*contents), **row}).messages


def sample(row: dict[str, Any], format_name: str = "messages") -> Sample:
    return normalise(row, format_name, DataSource(path="x.jsonl"))


def image(source: str | bytes) -> Medium:
    return Medium("image", source)


def test_tags_become_marks_with_the_columns_media_in_order() -> None:
    found = messages("<image>Who?<image>", "They.", "And<image>?", "It.", images=["a.png", "b.png", "c.png"])
    assert [one.content for one in found] == [f"{IMAGE}Who?{IMAGE}", "They.", f"And{IMAGE}?", "It."]
    assert [one.media for one in found] == [(image("a.png"), image("b.png")), (), (image("c.png"),), ()]


@pytest.mark.parametrize("row", [
    {"images": ["a.png"]}, {"image": "a.png"}, {"image": ["a.png"]}, {"images": "a.png"}, {"images": '["a.png"]'},
    {"images": [{"path": "a.png", "bytes": None}]}, {"image": {"path": "a.png", "bytes": b""}},
    {"images": [{"url": "a.png"}]}, {"images": '[{"path": "a.png"}]'}, {"images": ["a.png"], "image": None},
])  # fmt: skip
def test_a_column_is_written_in_many_ways(row: dict[str, Any]) -> None:
    assert messages("<image>?", ".", **row)[0] == Message("user", f"{IMAGE}?", media=(image("a.png"),))


@pytest.mark.parametrize("value", [{"bytes": PNG, "path": "a.png"}, {"bytes": PNG, "path": None}, PNG,
                                   bytearray(PNG), {"data": BASE64}])  # fmt: skip
def test_a_column_may_hold_the_file_itself(value: Any) -> None:
    assert messages("<image>?", ".", image=value)[0].media == (image(PNG),)


@pytest.mark.parametrize(("part", "medium"), [
    ({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, image("a.png")),
    ({"type": "image_url", "image_url": "a.png"}, image("a.png")),
    ({"type": "input_image", "image_url": "a.png"}, image("a.png")),
    ({"type": "image", "image": "a.png"}, image("a.png")),
    ({"type": "image", "image": {"bytes": PNG, "path": None}, "text": None}, image(PNG)),
    ({"type": "image", "url": "a.png"}, image("a.png")),
    ({"type": "image", "path": "a.png"}, image("a.png")),
    ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}}, image(PNG)),
    ({"type": "image", "source": {"type": "url", "url": "http://a/b.png"}}, image("http://a/b.png")),
    ({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BASE64}"}},
     image(f"data:image/png;base64,{BASE64}")),
    ({"type": "input_audio", "input_audio": {"data": BASE64, "format": "wav"}}, Medium("audio", PNG)),
    ({"type": "audio_url", "audio_url": {"url": "a.wav"}}, Medium("audio", "a.wav")),
    ({"type": "audio", "audio": "a.wav"}, Medium("audio", "a.wav")),
    ({"type": "video", "video": "a.mp4"}, Medium("video", "a.mp4")),
    ({"type": "video_url", "video_url": {"url": "a.mp4"}}, Medium("video", "a.mp4")),
])  # fmt: skip
def test_typed_parts_of_each_dialect(part: dict[str, Any], medium: Medium) -> None:
    found = messages([{"type": "text", "text": "Look: "}, part, {"type": "text", "text": "?"}], "yes")
    assert found[0] == Message("user", f"Look: {MARKS[medium.kind]}?", media=(medium,))


def test_parts_without_a_source_take_the_columns_media_in_turn() -> None:
    own = {"type": "image", "image": "own.png"}
    found = messages([{"type": "image"}, own, {"type": "text", "text": "?"}, {"type": "image"}], ".",
                     images=["a.png", "b.png"])  # fmt: skip
    assert found[0].content == f"{IMAGE}{IMAGE}?{IMAGE}"
    assert [medium.source for medium in found[0].media] == ["a.png", "own.png", "b.png"]


def test_without_tags_media_stand_before_the_first_question() -> None:
    found = sample(
        {"messages": [{"role": "system", "content": "Be brief."}, *turns("Who?", "They.")], "images": ["a", "b"]}
    ).messages
    assert found[1] == Message("user", f"{IMAGE}{IMAGE}Who?", media=(image("a"), image("b")))


def test_media_before_the_first_question_go_before_its_own() -> None:
    found = messages([{"type": "image", "image": "own"}, {"type": "text", "text": "?"}], ".", images=["a", "b"])
    assert found[0].content == f"{IMAGE * 3}?"
    assert [medium.source for medium in found[0].media] == ["a", "b", "own"]


def test_media_come_in_the_order_of_their_marks_across_kinds() -> None:
    found = messages("<video><image>a<audio><image>", ".", images=["i1", "i2"], audios=["a1"], videos=["v1"])
    assert found[0].content == f"{VIDEO}{IMAGE}a{AUDIO}{IMAGE}"
    assert [medium.source for medium in found[0].media] == ["v1", "i1", "a1", "i2"]
    parts = [{"type": kind, kind: name} for kind, name in (("video", "v"), ("image", "i"), ("audio", "a"))]
    assert [medium.source for medium in messages(parts, ".")[0].media] == ["v", "i", "a"]


@pytest.mark.parametrize(("content", "images", "reason"), [
    ("<image>?", [], r"has 1 places for images \(<image>\) and 0 images"),
    ("<image>?", None, r"has 1 places for images \(<image>\) and 0 images"),
    ("<image>?", ["a", "b"], r"has 1 places for images \(<image>\) and 2 images"),
    ("<image><image>?", ["a"], r"has 2 places for images \(<image>\) and 1 images"),
    ([{"type": "image"}], ["a", "b"], r"has 1 places for images \(<image>\) and 2 images"),
])  # fmt: skip
def test_tags_and_media_of_another_number_are_refused(content: Any, images: Any, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        messages(content, ".", images=images)


def test_a_part_that_stands_for_an_image_which_is_not_there_is_refused() -> None:
    with pytest.raises(RowError, match="has 1 places for images"):
        messages([{"type": "image"}, {"type": "text", "text": "?"}], ".")


@pytest.mark.parametrize(("value", "reason"), [
    ([""], "`images 1` is no path, URL, data URI or bytes"),
    (["a", 3], "`images 2` is no path"),
    ([None], "`images 1` is no path"),
    ([{"bytes": None, "path": None}], "`images 1` is no path"),
    ([b""], "`images 1` is no path"),
    ("[not json", "`images` is text, and not the JSON of a list"),
    ([{"data": "no base64!"}], "`images 1` is not base64"),
])  # fmt: skip
def test_what_is_no_medium_is_refused(value: Any, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        messages("<image>?", ".", images=value)


def test_base64_may_be_broken_into_lines() -> None:
    lines = base64.encodebytes(PNG * 20).decode()
    assert lines.count("\n") > 1
    part = {"type": "input_audio", "input_audio": {"data": lines, "format": "wav"}}
    assert messages([part], ".")[0].media == (Medium("audio", PNG * 20),)


def test_prompts_and_completions_of_trl_have_media() -> None:
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]}]
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "They."}]}]
    other = [{"role": "assistant", "content": "Me."}]
    for row in ({"prompt": prompt, "completion": answer}, {"prompt": prompt, "chosen": answer, "rejected": other}):
        found = sample(row | {"images": ["a.png"]}, detect([row], path="x"))
        assert found.messages[0] == Message("user", f"{IMAGE}Who?", media=(image("a.png"),))


def test_a_tag_in_a_row_without_such_a_column_is_text() -> None:
    found = messages("What does <image> mean in HTML? <video>?", "A tag.", audios=[])
    assert found[0] == Message("user", "What does <image> mean in HTML? <video>?")


def test_a_row_of_media_without_a_question_is_refused() -> None:
    with pytest.raises(RowError, match="no question that they could stand before"):
        sample({"messages": [{"role": "assistant", "content": "."}], "images": ["a"]})


def test_every_conversational_format_has_media() -> None:
    shared = {"images": ["a.png"]}
    rows = {
        "alpaca": {"instruction": "<image>Who?", "output": "They."},
        "sharegpt": {"conversations": [{"from": "human", "value": "<image>Who?"}, {"from": "gpt", "value": "They."}]},
        "query_response": {"query": "<image>Who?", "response": "They."},
    }
    for row in rows.values():
        name = detect([row | shared], path="x")
        first, _ = sample(row | shared, name).messages
        assert (first.content, first.media) == (f"{IMAGE}Who?", (image("a.png"),))


@pytest.mark.parametrize("mark", MARKS.values())
@pytest.mark.parametrize("row", [
    {"messages": turns("{}?", ".")}, {"messages": turns("?", "{}.")},
    {"messages": turns([{"type": "text", "text": "{}"}], ".")},
    {"query": "{}?", "response": "."}, {"instruction": "Say", "input": "{}", "output": "."},
    {"query": "?", "response": ".", "history": [["a{}", "b"]]}, {"query": "?", "response": ".", "system": "{}"},
    {"conversations": [{"from": "human", "value": "{}"}, {"from": "gpt", "value": "."}]},
])  # fmt: skip
def test_a_mark_in_the_text_of_a_row_never_becomes_a_medium(row: dict[str, Any], mark: str) -> None:
    hostile = json.loads(json.dumps(row).replace("{}", json.dumps(mark)[1:-1]))
    for extra in ({}, {"images": ["a.png"]}):
        with pytest.raises(RowError, match="private use area"):
            sample(hostile | extra, detect([hostile], path="x"))


def test_a_rejected_answer_has_the_media_of_its_question() -> None:
    found = sample({"messages": turns("<image>Who?", "They."), "rejected_response": "Me.", "images": ["a.png"]},
                   "preference")  # fmt: skip
    for side in (found.messages, found.rejected):
        assert side[0].media == (image("a.png"),)
