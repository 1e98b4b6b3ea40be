"""The stream visits every row as often as its weight says, in chunks, whatever the settings."""

from __future__ import annotations

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from rayswift.config.job import DataSource, DataSpec
from rayswift.data.sources import FileIndex, Span
from rayswift.data.stream import StreamPlan, plan_stream


def file_of(source: int, num_rows: int, span_rows: int = 16) -> FileIndex:
    starts = range(0, num_rows, span_rows)
    spans = tuple(Span(s, min(span_rows, num_rows - s), s, s + span_rows, 100 * span_rows) for s in starts)
    return FileIndex(f"f{source}", source, "jsonl", num_rows, 0, f"sha{source}", spans)


@st.composite
def plans(draw: st.DrawFn) -> StreamPlan:
    sizes = draw(st.lists(st.integers(1, 120), min_size=1, max_size=3))
    weights = [draw(st.sampled_from([0.25, 0.5, 1.0, 1.7, 2.0])) for _ in sizes]
    sources = tuple(DataSource(path="x", weight=weight) for weight in weights)
    data = DataSpec(train=sources, chunk_rows=draw(st.integers(1, 64)), shuffle=draw(st.booleans()))
    files = [file_of(i, size) for i, size in enumerate(sizes)]
    epochs, seed = draw(st.integers(1, 3)), draw(st.integers(0, 5))
    return plan_stream(files, sources, ["text"] * len(sizes), data=data, rendering="text", epochs=epochs, seed=seed)


@given(plan=plans())
def test_every_epoch_visits_every_row_by_its_weight(plan: StreamPlan) -> None:
    chunks = [plan.chunk(i) for i in range(plan.num_chunks)]
    assert [chunk.index for chunk in chunks] == list(range(plan.num_chunks))
    assert all(chunk.parts for chunk in chunks)
    assert sum(chunk.num_rows for chunk in chunks) == plan.num_rows_total
    for epoch in range(plan.epochs):
        whole: Counter[tuple[int, int]] = Counter()
        partial: Counter[int] = Counter()
        for part in (part for chunk in chunks if chunk.epoch == epoch for part in chunk.parts):
            if part.num_rows == part.size:
                first = plan.files[part.file].spans[part.span].first_row + part.first
                whole.update((part.file, row) for row in range(first, first + part.size))
            else:
                partial[part.file] += part.num_rows
        for number, file in enumerate(plan.files):
            weight = plan.sources[number].weight
            counts = [whole[number, row] for row in range(file.num_rows)]
            assert set(counts) <= {int(weight), int(weight) + 1}
            visited = sum(counts) + partial[number]
            assert visited == int(weight) * file.num_rows + math.floor(file.num_rows * (weight % 1) + 1e-9)


@given(plan=plans())
def test_chunks_are_about_as_large_as_asked(plan: StreamPlan) -> None:
    for i in range(plan.num_chunks):
        chunk = plan.chunk(i)
        largest = max(part.num_rows for part in chunk.parts)
        assert chunk.num_rows <= plan.settings.chunk_rows + largest
