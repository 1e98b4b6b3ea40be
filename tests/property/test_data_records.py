"""CSV of any kind: no byte in no record, no line in two, and the same rows however a file is cut into spans."""

from __future__ import annotations

import io

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rayswift.config.job import DataSource
from rayswift.data.records import records
from rayswift.data.sources import index_sources, read_rows
from rayswift.data.types import BadRow

PIECES = ["a", "b", ",", '"', '""', "\n", "\n", "\r\n", ',"', '",', "a,b\n", '"a","b"\n', '"x\ny",z\n', "é"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
@example('a,"b\nc,d\n"e\nf" g,h\n')
def test_every_byte_is_in_one_record(text: str) -> None:
    data = text.encode()
    found = list(records(io.BytesIO(data), ",", 2))
    assert b"".join(record.raw for record in found) == data
    for record in found:
        assert not record.raw.strip(b"\r\n") or record.fields or record.fault
        assert record.fault or len(record.fields) in (0, 2)
        assert record.fault is None or record.raw.count(b"\n") <= 1, "a bad record is one line"


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, span_rows=st.integers(1, 4))
@example(text='a,"b\n"x\ny",z\nc" d,e\nf,g\n', span_rows=1)
def test_rows_do_not_depend_on_spans(text: str, span_rows: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.csv"
    path.write_bytes(b"q,a\n" + text.encode())

    def rows(size: int) -> list[tuple[int, int | None, object]]:
        (index,) = index_sources([DataSource(path=str(path))], span_rows=size)
        found = [raw for span in index.spans for raw in read_rows(index, span)]
        assert [row for row, _, _ in found] == list(range(index.num_rows))
        return [(row, line, value.reason if isinstance(value, BadRow) else value) for row, line, value in found]

    assert rows(span_rows) == rows(256)
