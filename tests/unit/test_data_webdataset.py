"""WebDataset archives: rows from groups of files, in bounded memory, and what a broken archive says."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayswift.config.job import DataSource
from rayswift.data.detect import detect, normalise
from rayswift.data.readers import webdataset
from rayswift.data.sources import FileIndex, index_sources, read_rows
from rayswift.data.tar import BLOCK, BrokenTar, HeldBytes, members
from rayswift.data.types import BadRow, Medium
from rayswift.errors import DataError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write_tar(path: Path, files: list[tuple[str, bytes]], format: str = "gnu") -> Path:
    with tarfile.open(path, "w", format=FORMATS[format]) as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def index_of(path: Path, span_rows: int = 256) -> FileIndex:
    (index,) = index_sources([DataSource(path=str(path))], span_rows=span_rows)
    return index


def rows_of(index: FileIndex) -> list[Any]:
    return [raw for span in index.spans for raw in read_rows(index, span)]


@pytest.mark.parametrize("span_rows", [1, 2, 256])
@pytest.mark.parametrize("format", FORMATS)
def test_the_files_of_a_name_are_a_row(tmp_path: Path, format: str, span_rows: int) -> None:
    files = [
        ("a/0.jpg", b"\xff\xd8one"), ("a/0.json", b'{"messages": [1], "n": 2}'),
        ("a/1.left.png", b"l"), ("a/1.right.PNG", b"r"), ("a/1.txt", "zwölf\n".encode()),
        ("a/2.wav", b"w"), ("a/2.cls", b"7\n"), ("a/2.npy", b"array"),
        ("a/3.mp4", b"v"), ("a/3.cls", b"cat"), ("a/3.caption", b"a cat"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "x.tar", files, format)
    index = index_of(path, span_rows)
    left, right = {"bytes": b"l", "path": "a/1.left.png"}, {"bytes": b"r", "path": "a/1.right.PNG"}
    assert rows_of(index) == [
        (0, None, {"__key__": "a/0", "messages": [1], "n": 2,
                   "images": [{"bytes": b"\xff\xd8one", "path": "a/0.jpg"}]}),
        (1, None, {"__key__": "a/1", "text": "zwölf", "images": [left, right]}),
        (2, None, {"__key__": "a/2", "label": 7, "npy": {"bytes": b"array", "path": "a/2.npy"},
                   "audios": [{"bytes": b"w", "path": "a/2.wav"}]}),
        (3, None, {"__key__": "a/3", "label": "cat", "caption": "a cat",
                   "videos": [{"bytes": b"v", "path": "a/3.mp4"}]}),
    ]  # fmt: skip
    assert (index.num_rows, index.size_bytes) == (4, path.stat().st_size)
    assert index.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(index.spans) == -(-4 // span_rows)


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_long_and_foreign_names(tmp_path: Path, format: str) -> None:
    long = "/".join(["deep" * 20] * 4) + "/näme"
    path = write_tar(tmp_path / "x.tar", [(f"{long}.txt", b"one"), ("two.txt", b"two")], format)
    assert [(row["__key__"], row["text"]) for _, _, row in rows_of(index_of(path, 1))] == [
        (long, "one"),
        ("two", "two"),
    ]


def test_names_are_only_names(tmp_path: Path) -> None:
    files = [
        ("../../etc/x.txt", b"a"),
        ("/root.txt", b"b"),
        (".hidden.txt", b"c"),
        ("no-ending", b"d"),
        ("._z.txt", b"e"),
    ]
    path = write_tar(tmp_path / "x.tar", files)
    assert [row["__key__"] for _, _, row in rows_of(index_of(path))] == ["../../etc/x", "/root"]
    assert sorted(tmp_path.iterdir()) == [path]


def test_folders_and_links_between_files_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for number, kind in enumerate((tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(f"{number}.txt")
            info.size = 1
            archive.addfile(info, io.BytesIO(b"x"))
            between = tarfile.TarInfo(f"{number}.json")
            between.type, between.linkname = kind, "elsewhere"
            archive.addfile(between)
    for span_rows in (1, 3):
        assert [row for _, _, row in rows_of(index_of(path, span_rows))] == [
            {"__key__": str(n), "text": "x"} for n in range(4)
        ]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([("a.json", b"[1]")], r"a\.json, which is a JSON list"),
        ([("a.json", b"{")], r"a\.json, which is not JSON"),
        ([("a.txt", b"\xff")], r"a\.txt, which is not UTF-8: byte 1"),
        ([("a.json", b'{"text": "1"}'), ("a.txt", b"2")], r"`text` in a\.txt and in another file"),
        ([(f"a.{i}.jpg", b"") for i in range(1002)], "has more than 1000 files"),
    ],
)
def test_a_bad_group_is_a_bad_row(tmp_path: Path, files: list[tuple[str, bytes]], reason: str) -> None:
    index = index_of(write_tar(tmp_path / "x.tar", [*files, ("b.txt", b"good")]))
    (_, _, bad), (_, _, good) = rows_of(index)
    assert isinstance(bad, BadRow)
    assert re.search(reason, bad.reason)
    assert (bad.row, bad.content, good) == (0, "a", {"__key__": "b", "text": "good"})


def test_the_pictures_of_the_archive_replace_what_the_row_calls_them(tmp_path: Path) -> None:
    row = {"image": "0.jpg", "images": ["0.jpg"], "audio": "kept", "messages": []}
    path = write_tar(tmp_path / "x.tar", [("0.json", json.dumps(row).encode()), ("0.jpg", b"p")])
    ((_, _, found),) = rows_of(index_of(path))
    assert found == {"__key__": "0", "audio": "kept", "messages": [], "images": [{"bytes": b"p", "path": "0.jpg"}]}


def test_pictures_reach_the_conversation_as_bytes(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "a cat"}]}
    path = write_tar(tmp_path / "x.tar", [("0.json", json.dumps(row).encode()), ("0.jpg", b"pixels")])
    source = DataSource(path=str(path))
    ((_, _, found),) = rows_of(index_of(path))
    assert normalise(found, detect([found]), source).media == (Medium("image", b"pixels"),)


def test_a_row_that_is_too_large_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "MAX_ROW_BYTES", 100 << 10)
    path = write_tar(
        tmp_path / "x.tar", [("0.txt", b"a"), ("1.jpg", bytes(200 << 10)), ("1.txt", b"b"), ("2.txt", b"c")]
    )
    index = index_sources([DataSource(path=str(path))], span_rows=1)[0]
    read: list[int] = []
    real = webdataset.read_range
    monkeypatch.setattr(webdataset, "read_range", lambda p, a, b: read.append(b - a) or real(p, a, b))
    (_, _, first), (_, _, bad), (_, _, last) = rows_of(index)
    assert (first["text"], last["text"]) == ("a", "c")
    assert isinstance(bad, BadRow)
    assert (bad.reason, bad.content) == ("has 201.5 KiB in the archive, over the 100.0 KiB of a row", "1.jpg")
    assert max(read) <= 8 * BLOCK


def absurd_size(raw: bytearray) -> None:
    raw[124:136] = (0x80 << 88 | 10 << 40).to_bytes(12, "big")
    raw[148:156] = b"%06o\0 " % (sum(raw[:148]) + 8 * 32 + sum(raw[156:BLOCK]))


def negative_size(raw: bytearray) -> None:
    raw[124:136] = (256**12 - 5).to_bytes(12, "big")
    raw[148:156] = b"%06o\0 " % (sum(raw[:148]) + 8 * 32 + sum(raw[156:BLOCK]))


def extended_of_terabytes(raw: bytearray) -> None:
    raw[156:157] = b"x"
    absurd_size(raw)


def no_record(raw: bytearray) -> None:
    raw[156:157] = b"x"
    absurd_size(raw)
    raw[124:136] = b"00000000100\0"
    raw[148:156] = b"%06o\0 " % (sum(raw[:148]) + 8 * 32 + sum(raw[156:BLOCK]))


def sparse(raw: bytearray) -> None:
    raw[156:157] = b"S"
    raw[148:156] = b"%06o\0 " % (sum(raw[:148]) + 8 * 32 + sum(raw[156:BLOCK]))


BROKEN = [
    (absurd_size, r"says that 0\.txt has 10995116277760 bytes, and ends after \d+ of them; get the archive again"),
    (negative_size, r"has a file of -5 bytes at byte 0"),
    (extended_of_terabytes, r"has an extended header of 10995116277760 bytes"),
    (no_record, r"has a pax header at byte 0 that cannot be read"),
    (sparse, r"has the sparse file 0\.txt"),
    (lambda raw: raw.__delitem__(slice(BLOCK * 2, None)), "ends without the mark"),
    (lambda raw: raw.__delitem__(slice(BLOCK * 2 + 100, None)), "ends without the mark"),
    (lambda raw: raw.__delitem__(slice(BLOCK + 100, None)), r"0\.txt has 300 bytes, and ends after 100"),
    (lambda raw: raw.__setitem__(slice(0, 5), b"xxxxx"), r"no header of a file at byte 0 \(bad checksum\)"),
    (lambda raw: raw.__setitem__(slice(0, None), b"\x1f\x8b" + bytes(1000)), "no header of a file at byte 0"),
    (lambda raw: raw.clear(), "ends without the mark"),
]


@pytest.mark.parametrize(("harm", "rule"), BROKEN)
def test_a_broken_archive_is_named(tmp_path: Path, harm: Any, rule: str) -> None:
    path = write_tar(tmp_path / "x.tar", [("0.txt", b"a" * 300), ("1.txt", b"b" * 300)])
    raw = bytearray(path.read_bytes())
    harm(raw)
    path.write_bytes(raw)
    with pytest.raises(DataError, match=rf"x\.tar .*{rule}"):
        index_of(path)


def test_an_archive_that_changed_is_told(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("0.txt", b"a")])
    index = index_of(path)
    path.write_bytes(b"z" * path.stat().st_size)
    with pytest.raises(DataError, match=r"x\.tar changed after it was indexed: it has no header"):
        rows_of(index)


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz"])
def test_a_compressed_archive_is_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=rf"{name} is compressed, .* `gunzip` and name the \.tar"):
        index_of(tmp_path / name)


def test_an_archive_in_no_order_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("0.jpg", b""), ("1.jpg", b""), ("0.txt", b""), ("1.txt", b"")])
    with pytest.raises(DataError, match=r"x\.tar has the files of 0 in several places, .*--sort=name"):
        index_of(path)


names = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="/.\0"), min_size=1, max_size=60), min_size=1)


@given(names=names, contents=st.lists(st.binary(max_size=1500), min_size=1), format=st.sampled_from(["gnu", "pax"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_headers_are_read_as_python_reads_them(
    tmp_path: Path, names: list[str], contents: list[bytes], format: str
) -> None:
    files = [(f"{name * 4}.{i}", contents[i % len(contents)]) for i, name in enumerate(names)]
    raw = write_tar(tmp_path / "x.tar", files, format).read_bytes()
    found = [(member.name, raw[member.start : member.start + member.size]) for member in members(HeldBytes(raw))]
    assert found == files


@given(raw=st.binary(max_size=3000), at=st.integers(0, 2048))
def test_noise_raises_nothing_but_a_broken_tar(raw: bytes, at: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("ä" * 200, "b"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
    whole = buffer.getvalue()
    with suppress(BrokenTar):
        list(members(HeldBytes(whole[:at] + raw + whole[at + len(raw) :])))
