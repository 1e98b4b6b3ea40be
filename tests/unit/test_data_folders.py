"""Folders of media: described by a metadata file or by labels, and the questions that their rows become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayswift.config.job import DataSource, MediaSpec
from rayswift.data.detect import detect, normalise, renamed
from rayswift.data.formats import RowError
from rayswift.data.formats.captioned import Captioned
from rayswift.data.inspect import preflight
from rayswift.data.media.reading import read
from rayswift.data.sources import FileIndex, index_sources, read_rows
from rayswift.data.types import BadRow, Message, Sample
from rayswift.errors import ConfigError, DataError


def write(folder: Path, *names: str, content: bytes = b"pixels") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content + name.encode())
    return folder


def index_of(path: Path | str, span_rows: int = 256, **source: Any) -> FileIndex:
    (index,) = index_sources([DataSource(path=str(path), **source)], span_rows=span_rows)
    return index


def rows_of(index: FileIndex) -> list[Any]:
    return [row for span in index.spans for _, _, row in read_rows(index, span)]


@pytest.mark.parametrize("span_rows", [1, 2, 256])
def test_a_folder_is_a_label(tmp_path: Path, span_rows: int) -> None:
    names = ("cat/1.jpg", "cat/2.PNG", "train/dog/3.webp", "dog/bark.wav", "dog/run.mp4")
    write(tmp_path, *names, "dog/.hidden.jpg", ".cache/x/4.jpg", "README.md", "notes.xyz")
    index = index_of(tmp_path, span_rows)
    assert rows_of(index) == [
        {"images": ["cat/1.jpg"], "label": "cat"},
        {"images": ["cat/2.PNG"], "label": "cat"},
        {"audios": ["dog/bark.wav"], "label": "dog"},
        {"videos": ["dog/run.mp4"], "label": "dog"},
        {"images": ["train/dog/3.webp"], "label": "dog"},
    ]
    assert index.path == f"{tmp_path}/"
    assert (index.num_rows, len(index.spans)) == (5, -(-5 // span_rows))
    assert index.size_bytes == sum((tmp_path / name).stat().st_size for name in names)


def test_the_hash_of_a_folder_follows_names_and_bytes(tmp_path: Path) -> None:
    first = index_of(write(tmp_path / "a", "x/1.jpg", "y/2.jpg")).sha256
    assert index_of(write(tmp_path / "b", "x/1.jpg", "y/2.jpg")).sha256 == first
    assert index_of(write(tmp_path / "c", "x/1.jpg", "y/2.jpg", content=b"others")).sha256 != first
    assert index_of(write(tmp_path / "d", "x/1.jpg", "z/2.jpg")).sha256 != first


def test_a_folder_that_changed_is_told(tmp_path: Path) -> None:
    index = index_of(write(tmp_path, "x/1.jpg", "y/2.jpg"))
    write(tmp_path, "x/0.jpg", content=b"more")
    with pytest.raises(DataError, match="changed after it was indexed"):
        rows_of(index)


def test_large_files_make_spans_of_few(tmp_path: Path) -> None:
    for name in ("x/1.wav", "x/2.wav", "y/3.wav"):
        write(tmp_path, name, content=bytes(3 << 20))
    index = index_of(tmp_path)
    assert [span.num_rows for span in index.spans] == [1, 1, 1]
    assert len(rows_of(index.limited(2))) == 2


def test_a_file_in_no_folder_has_no_label(tmp_path: Path) -> None:
    bad = rows_of(index_of(write(tmp_path, "0.jpg", "x/1.jpg", "y/2.jpg")))[0]
    assert isinstance(bad, BadRow)
    assert (bad.reason, bad.content) == ("lies in no folder that would be its label", "0.jpg")


@pytest.mark.parametrize("names", [("1.jpg", "2.jpg"), ("all/1.jpg", "all/2.jpg")])
def test_media_that_nothing_tells_apart_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=r"nothing to answer of them: .*metadata\.jsonl"):
        index_of(write(tmp_path, *names))


def test_texts_beside_media_are_not_guessed_at(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.jpg", "dog/2.jpg", "classes.txt")
    with pytest.raises(ConfigError, match=r"data\.train\.0\.path=.* has texts beside .*cat/1\.jpg: which are the rows"):
        index_of(tmp_path)
    assert rows_of(index_of(f"{tmp_path}/*.txt")) == [{"text": "pixelsclasses.txt"}]


def test_rows_beside_media_are_the_rows(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.jpg", "dog/2.jpg")
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "images": ["cat/1.jpg"], "file_name": "x.jpg"}\n')
    assert rows_of(index_of(tmp_path)) == [{"text": "a", "images": ["cat/1.jpg"], "file_name": "x.jpg"}]


def test_folders_behind_urls(tmp_path: Path) -> None:
    import fsspec

    files = {"/photos/x/1.jpg": b"a", "/photos/y/2.jpg": b"b"}
    for name, content in files.items():
        fsspec.filesystem("memory").pipe(name, content)
    index = index_of("memory://photos")
    assert index.path == "memory:///photos/"
    assert [row["images"] for row in rows_of(index)] == [["x/1.jpg"], ["y/2.jpg"]]


def test_the_media_of_a_row_are_found(tmp_path: Path) -> None:
    """From the row of a folder to the bytes: paths start at the folder, or where the metadata file lies."""
    write(tmp_path / "labels", "cat/1.jpg", "dog/2.jpg")
    write(tmp_path / "told", "deep/1.jpg")
    (tmp_path / "told" / "metadata.csv").write_text("file_name,text\ndeep/1.jpg,one\n../labels/cat/1.jpg,two\n")
    found = []
    for folder in ("labels", "told"):
        source = DataSource(path=str(tmp_path / folder), question="What is it?")
        index = index_of(tmp_path / folder)
        assert preflight([source], [index]) == ("captioned",)
        for row in rows_of(index):
            (medium,) = normalise(row, "captioned", source).media
            try:
                found.append(read(medium, index.path, MediaSpec()))
            except RowError as error:
                found.append(str(error)[:29].encode())
    assert found == [
        b"pixelscat/1.jpg",
        b"pixelsdog/2.jpg",
        b"pixelsdeep/1.jpg",
        b"names ../labels/cat/1.jpg, whi"[:29],
    ]


ROWS = [
    {"file_name": "a/1.jpg", "text": "one"},
    {"file_name": "2.wav", "text": "two", "label": "x"},
    {"left_file_name": "3.png", "right_file_name": "4.png", "text": "three", "images": ["old"]},
    {"file_name": "report.pdf", "text": "four"},
    {"file_name": None, "text": "five"},
    {"file_names": ["5.png", "6.mp4"], "text": "six"},
]
EXPECTED = [
    {"images": ["a/1.jpg"], "text": "one"},
    {"audios": ["2.wav"], "text": "two", "label": "x"},
    {"images": ["3.png", "4.png"], "text": "three"},
    {"file_name": "report.pdf", "text": "four"},
    {"file_name": None, "text": "five"},
    {"images": ["5.png"], "videos": ["6.mp4"], "text": "six"},
]


def test_a_metadata_file_names_the_media_of_its_rows(tmp_path: Path) -> None:
    write(tmp_path, "a/1.jpg")
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "{\n")
    *good, bad = rows_of(index_of(tmp_path))
    assert good == EXPECTED
    assert isinstance(bad, BadRow)


def test_metadata_in_other_kinds_of_files(tmp_path: Path) -> None:
    expected = [{"images": ["a/1.jpg"], "text": "one"}]
    (tmp_path / "metadata.csv").write_text("file_name,text\na/1.jpg,one\n")
    assert rows_of(index_of(tmp_path / "metadata.csv")) == expected
    pq.write_table(pa.Table.from_pylist(ROWS[:1]), tmp_path / "metadata.parquet")
    assert rows_of(index_of(tmp_path / "metadata.parquet")) == expected
    (tmp_path / "other.csv").write_text("file_name,text\na/1.jpg,one\n")
    assert rows_of(index_of(tmp_path / "other.csv")) == [{"file_name": "a/1.jpg", "text": "one"}]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], list[Message]]]:
    """What the format hands over to be made a conversation: what becomes of media is not its business."""
    found: list[tuple[dict[str, Any], list[Message]]] = []

    def conversation(row: dict[str, Any], messages: list[Message]) -> Sample:
        found.append((row, messages))
        return Sample(tuple(messages))

    monkeypatch.setattr("rayswift.data.formats.captioned.conversation", conversation)
    return found


@pytest.mark.parametrize(
    ("row", "asked", "answer"),
    [
        ({"images": ["1.jpg"], "text": "a cat"}, "", "a cat"),
        ({"image": {"bytes": b"x", "path": None}, "label": 0}, "", "0"),
        ({"audio": "a.wav", "transcription": "hello", "question": "What is said?"}, "What is said?", "hello"),
        ({"videos": ["a.mp4"], "caption": "a dog", "instruction": "Look.", "text": None}, "Look.", "a dog"),
    ],
)
def test_media_and_what_is_said_of_them(said: Any, row: dict[str, Any], asked: str, answer: str) -> None:
    assert detect([row]) == "captioned"
    Captioned().normalise(row)
    assert said == [(row, [Message("user", asked), Message("assistant", answer)])]


def test_the_question_of_a_source(said: Any) -> None:
    source = DataSource(path="x", question="Which digit is this?", system="Be brief.")
    row = renamed({"images": ["1.jpg"], "label": "7"}, source)
    assert detect([row]) == "captioned"
    Captioned().normalise(row)
    assert said[0][1] == [Message("user", "Which digit is this?"), Message("assistant", "7")]
    assert renamed({"question": "my own"}, source)["question"] == "my own"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"images": [], "text": "a"}, "has no image, sound or video"),
        ({"images": ["1.jpg"], "text": "a", "label": 3}, "has both `text` and `label`"),
        ({"images": ["1.jpg"], "text": " "}, "`text` is empty"),
        ({"images": ["1.jpg"], "label": None, "text": None}, "`text` is missing"),
        ({"images": ["1.jpg"], "label": True}, "`label` is a boolean"),
        ({"images": ["1.jpg"], "text": 3}, "`text` is a number, not text"),
    ],
)
def test_what_is_no_pair_of_media_and_text(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        Captioned().normalise(row)


@pytest.mark.parametrize(
    ("columns", "format"),
    [
        ({"images", "query", "response", "label"}, "query_response"),
        ({"image", "messages", "text"}, "messages"),
        ({"images", "prompt", "completion", "text"}, "prompt_completion"),
        ({"text", "label"}, "text"),
    ],
)
def test_other_formats_go_before(columns: set[str], format: str) -> None:
    assert detect([dict.fromkeys(columns, "x")]) == format


def test_a_question_that_nothing_asks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "document"}\n')
    sources = [DataSource(path=str(tmp_path / "a.jsonl"), question="What?")]
    with pytest.raises(ConfigError, match=r"data\.train\.0\.question=What\? is asked of rows of media .*format text"):
        preflight(sources, index_sources(sources))
