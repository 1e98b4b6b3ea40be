"""Every kind of file: rows with the right numbers and lines, bad rows with reasons, and hopeless files as errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayswift import plugins
from rayswift.config.job import DataSource
from rayswift.data.sources import FileIndex, index_sources, read_rows
from rayswift.data.types import BadRow
from rayswift.errors import DataError


def index_of(path: Path, *, span_rows: int = 256, **source: Any) -> FileIndex:
    (index,) = index_sources([DataSource(path=str(path), **source)], span_rows=span_rows)
    return index


def rows_of(index: FileIndex) -> list[Any]:
    return [raw for span in index.spans for raw in read_rows(index, span)]


@pytest.mark.parametrize("name", plugins.names("data.readers"))
def test_every_reader_declares_extensions_of_its_own(name: str) -> None:
    mine = plugins.load("data.readers", name).extensions
    others = [
        e
        for other in plugins.names("data.readers")
        if other != name
        for e in plugins.load("data.readers", other).extensions
    ]
    assert mine
    assert not set(mine) & set(others)


@pytest.mark.parametrize("span_rows", [1, 2, 256])
def test_jsonl_skips_blank_lines_and_keeps_line_numbers(tmp_path: Path, span_rows: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \r\n{"a": 2}\r\n{"a": "\xc3\xa9\\n"}')
    index = index_of(path, span_rows=span_rows)
    assert rows_of(index) == [(0, 1, {"a": 1}), (1, 4, {"a": 2}), (2, 5, {"a": "é\n"})]
    assert index.num_rows == 3
    assert index.size_bytes == path.stat().st_size


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": }', "is not JSON: Expecting value at column 7"),
        (b"[1, 2]", "is a JSON list, not an object"),
        (b"3", "is a JSON number, not an object"),
        (b'{"a": "\xff"}', "is not UTF-8: byte 8 is 0xff"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_broken_jsonl_line_is_a_bad_row_and_the_others_are_read(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    first, (row, number, bad), last = rows_of(index_of(path))
    assert (first[2], last[2], row, number) == ({"a": 1}, {"a": 3}, 1, 2)
    assert isinstance(bad, BadRow)
    assert reason in bad.reason
    assert (bad.file, bad.row, bad.line) == (str(path), 1, 2)
    json.loads(bad.to_json())


def test_jsonl_lines_longer_than_a_block_stay_whole(tmp_path: Path) -> None:
    from rayswift.data.lines import scan_lines
    from rayswift.data.sources import ReadOptions

    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"i": i, "x": "y" * (i * 7 % 90)}) + "\n" for i in range(50)))
    with path.open("rb") as stream:
        scan = scan_lines(stream, ReadOptions(span_rows=4, span_bytes=200), block_bytes=64)
    data = path.read_bytes()
    found = [json.loads(line)["i"] for span in scan.spans for line in data[span.start : span.stop].splitlines()]
    assert found == list(range(50))
    assert [span.first_row for span in scan.spans][:1] == [0]
    assert sum(span.num_rows for span in scan.spans) == scan.num_rows == 50
    assert all(span.first_line == span.first_row + 1 for span in scan.spans)


@pytest.mark.parametrize("span_rows", [1, 3, 256])
def test_json_list_with_bad_elements(tmp_path: Path, span_rows: int) -> None:
    path = tmp_path / "a.json"
    path.write_bytes('[\n {"a": "é, ]"},\n 7 ,\n {"a": [1,\n 2]}\n, {"b": 1}]\n'.encode())
    rows = rows_of(index_of(path, span_rows=span_rows))
    assert [row[:2] for row in rows] == [(0, 2), (1, 3), (2, 4), (3, 6)]
    assert rows[0][2] == {"a": "é, ]"}
    assert rows[1][2].reason == "is a JSON number, not an object"
    assert rows[2][2] == {"a": [1, 2]}


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ('[\n {"a": 1},\n {"a": }\n]', ":3: is not JSON: Expecting value at column 8"),
        ('[{"a": 1}', ":1: is not JSON: expected ',' or ']' at column 10"),
        ('[{"a": 1},]', ":1: is not JSON: Expecting value at column 11"),
        ('[{"a": 1}] x', ":1: is not JSON: extra data after the list at column 12"),
        ('"é" and', ":1: is not JSON: expected a list of rows at column 1"),
        ('{\n"data": []\n}', "is one JSON object, not a list of rows"),
    ],
)
def test_a_broken_json_file_names_line_and_column(tmp_path: Path, content: str, where: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        index_of(path)
    assert where in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_json_file_with_an_object_per_line_is_read_as_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert [row for _, _, row in rows_of(index_of(path))] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("span_rows", [1, 2, 256])
def test_csv_with_quoted_newlines(tmp_path: Path, span_rows: int) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.writer(stream)
        writer.writerows([["q", "a"], ["one\ntwo", 'say "é"'], ["x", "y,z"], ["p", "q"]])
    rows = rows_of(index_of(path, span_rows=span_rows))
    assert [row for _, _, row in rows] == [
        {"q": "one\ntwo", "a": 'say "é"'},
        {"q": "x", "a": "y,z"},
        {"q": "p", "a": "q"},
    ]
    assert [(number, line) for number, line, _ in rows] == [(0, 2), (1, 4), (2, 5)]


def test_csv_bad_records(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'q,a\n1,2\n1,2,3\n\nx,\xff\n"a"b,c\nq\rx,a\ny,"never closed\nz,1\n')
    rows = rows_of(index_of(path))
    good, ragged, encoding, lenient, newline, unclosed, last = (row for _, _, row in rows)
    assert [line for _, line, _ in rows] == [2, 3, 5, 6, 7, 8, 9]
    assert good == {"q": "1", "a": "2"}
    assert ragged.reason == "has 3 fields, the header has 2"
    assert encoding.reason == "is not UTF-8: byte 3 is 0xff"
    assert encoding.line == 5
    assert lenient == {"q": "ab", "a": "c"}
    assert newline.reason.startswith("is not CSV: new-line character seen in unquoted field")
    assert unclosed.reason == "has a quote that is never closed"
    assert last == {"q": "z", "a": "1"}


@pytest.mark.parametrize("span_rows", [1, 7, 256])
@pytest.mark.parametrize(
    "closes", ["", 'q950,"a950"', 'q950,"a950', 'q950,"'], ids=["never", "later", "again", "empty"]
)
def test_a_quote_that_is_not_closed_swallows_no_row(tmp_path: Path, span_rows: int, closes: str) -> None:
    lines = [f"q{i},a{i}" for i in range(1000)]
    lines[900] = 'q900,"a900'
    if closes:
        lines[950] = closes
    path = tmp_path / "a.csv"
    path.write_text("question,answer\n" + "\n".join(lines) + "\n")
    index = index_of(path, span_rows=span_rows)
    rows = rows_of(index)
    if closes == 'q950,"':  # nothing tells this from a field of 51 lines
        assert index.num_rows == 950
        return
    assert index.num_rows == len(rows) == 1000
    assert [line for _, line, _ in rows] == list(range(2, 1002))
    bad = [(row.line, row.reason) for _, _, row in rows if isinstance(row, BadRow)]
    expected = [902, 952] if closes == 'q950,"a950' else [902]
    assert bad == [(line, "has a quote that is never closed") for line in expected]
    assert rows[901][2] == {"question": "q901", "answer": "a901"}


def test_a_broken_text_of_several_lines_gives_no_made_up_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('q,a\n"Dear all,\nhello, world\n\nbye" x,y\n"one, two\nthree, four",b,c\nz,1\n')
    rows = rows_of(index_of(path))
    assert [line for _, line, _ in rows] == [2, 3, 5, 6, 7, 8]
    assert rows[-1][2] == {"q": "z", "a": "1"}
    reasons = [row.reason for _, _, row in rows[:-1]]
    assert reasons == ["is not CSV: ',' expected after '\"'"] * 3 + ["has 3 fields, the header has 2"] * 2


def test_the_index_that_pandas_writes_is_no_column(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(",question,answer\n0,q,a\n")
    assert [row for _, _, row in rows_of(index_of(path))] == [{"question": "q", "answer": "a"}]
    for header in ("question,,answer", "", '""', '"question,answer'):
        path.write_text(header + "\n0,q,a\n")
        if header:
            with pytest.raises(DataError, match="the header"):
                index_of(path)


def test_csv_header_and_tabs(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("q\ta\n1,5\t2\n")
    assert rows_of(index_of(path))[0][2] == {"q": "1,5", "a": "2"}
    path.write_text("q\tq\n1\t2\n")
    with pytest.raises(DataError, match="empty or repeated name"):
        index_of(path)


def test_parquet_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    expected = [{"i": i, "turns": [{"role": "user", "content": f"é{i}"}]} for i in range(25)]
    pq.write_table(pa.Table.from_pylist(expected), path, row_group_size=10)
    index = index_of(path, span_rows=4)
    assert [(span.start, span.stop, span.num_rows) for span in index.spans][:4] == [
        (0, 0, 4),
        (0, 4, 4),
        (0, 8, 2),
        (1, 0, 4),
    ]
    assert [(row, line, value) for row, line, value in rows_of(index)] == [(i, None, expected[i]) for i in range(25)]
    path.write_bytes(b"not parquet")
    with pytest.raises(DataError, match="is not a Parquet file"):
        index_of(path)


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("line", [(0, 1, "one"), (1, 2, "two"), (2, 5, "three")]),
        ("paragraph", [(0, 1, "one\ntwo"), (1, 5, "three")]),
        ("document", [(0, 1, "one\ntwo\n\n \nthree\n")]),
    ],
)
@pytest.mark.parametrize("span_rows", [1, 256])
def test_text_units(tmp_path: Path, unit: str, expected: list[Any], span_rows: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo\n\n \nthree\n")
    index = index_of(path, span_rows=span_rows, text_unit=unit)
    assert rows_of(index) == [(row, line, {"text": text}) for row, line, text in expected]


@pytest.mark.parametrize("unit", ["line", "paragraph", "document"])
def test_text_that_is_not_utf8_is_a_bad_row(tmp_path: Path, unit: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9\n")
    ((_, line, bad),) = rows_of(index_of(path, text_unit=unit))
    assert (line, bad.reason) == (1, "is not UTF-8: byte 4 is 0xe9")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.csv"])
def test_an_empty_file_has_no_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert index_of(tmp_path / name).num_rows == 0
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf")
    assert index_of(tmp_path / name).num_rows == 0


def test_a_file_that_shrank_after_indexing_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    index = index_of(path)
    path.write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="changed after it was indexed"):
        rows_of(index)
    path.unlink()
    with pytest.raises(DataError, match="was removed after it was indexed"):
        rows_of(index)
