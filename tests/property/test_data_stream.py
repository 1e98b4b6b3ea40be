"""The stream visits every row as often as its weight says, in chunks, whatever the settings."""

from __future__ import annotations

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from rayswift.config.job import DataSource, DataSpec, MixingSpec
from rayswift.data.mixing import quotas
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


@st.composite
def mixed(draw: st.DrawFn) -> StreamPlan:
    sizes = draw(st.lists(st.integers(1, 120), min_size=1, max_size=4))
    weights = [draw(st.sampled_from([0.1, 0.25, 0.5, 0.7, 1.0, 1.7, 3.0])) for _ in sizes]
    sources = tuple(DataSource(path="x", weight=weight) for weight in weights)
    data = DataSpec(
        train=sources,
        chunk_rows=draw(st.integers(1, 64)),
        shuffle=draw(st.booleans()),
        mixing=MixingSpec(stopping=draw(st.sampled_from(["first_exhausted", "all_exhausted"]))),
    )
    files = [file_of(i, size) for i, size in enumerate(sizes)]
    epochs, seed = draw(st.integers(1, 3)), draw(st.integers(0, 5))
    return plan_stream(files, sources, ["text"] * len(sizes), data=data, rendering="text", epochs=epochs, seed=seed)


def visits(plan: StreamPlan, epoch: int) -> tuple[list[list[int]], list[int]]:
    """How often an epoch visits each row of each file in whole parts, and how many rows of each file in all."""
    whole = [[0] * file.num_rows for file in plan.files]
    total = [0] * len(plan.files)
    for part in (part for i in range(plan.num_chunks) if (c := plan.chunk(i)).epoch == epoch for part in c.parts):
        total[part.file] += part.num_rows
        if part.num_rows == part.size:
            first = plan.files[part.file].spans[part.span].first_row + part.first
            for row in range(first, first + part.size):
                whole[part.file][row] += 1
    return whole, total


@given(plan=mixed())
def test_an_epoch_of_mixed_sources_is_governed_by_one_of_them(plan: StreamPlan) -> None:
    sizes, weights = [file.num_rows for file in plan.files], [source.weight for source in plan.sources]
    stopping = plan.settings.stopping
    lengths = [size / weight for size, weight in zip(sizes, weights, strict=True)]
    length = min(lengths) if stopping == "first_exhausted" else max(lengths)
    for epoch in range(plan.epochs):
        whole, total = visits(plan, epoch)
        assert sum(total) == plan.rows_per_epoch
        governing = [i for i, one in enumerate(lengths) if math.isclose(one, length)]
        for i, size in enumerate(sizes):
            assert total[i] == math.floor(weights[i] * length + 1e-6)
            if i in governing:
                assert whole[i] == [1] * size
            elif stopping == "first_exhausted":
                assert total[i] <= size
                assert max(whole[i]) <= 1
            else:
                assert total[i] >= size
                assert set(whole[i]) <= {total[i] // size, total[i] // size + 1}


@given(plan=mixed())
def test_mixed_sources_stay_mixed_when_nothing_is_shuffled(plan: StreamPlan) -> None:
    if plan.settings.shuffle:
        return
    parts = [part for i in range(plan.num_chunks) if (c := plan.chunk(i)).epoch == 0 for part in c.parts]
    _, total = visits(plan, 0)
    seen = [0] * len(total)
    for part in parts:
        seen[part.file] += part.num_rows
        shares = [n / of for n, of in zip(seen, total, strict=True) if of]
        step = max(max(p.num_rows for p in parts if p.file == i) / of for i, of in enumerate(total) if of)
        assert max(shares) - min(shares) <= step + 1e-9


@given(
    sizes=st.lists(st.integers(1, 10**9), min_size=1, max_size=5),
    data=st.data(),
    stopping=st.sampled_from(["first_exhausted", "all_exhausted"]),
)
def test_quotas_of_any_size(sizes: list[int], data: st.DataObject, stopping: str) -> None:
    weights = [data.draw(st.floats(1e-6, 1e6)) for _ in sizes]
    got = quotas(sizes, weights, stopping)  # type: ignore[arg-type]
    assert any(n == size for n, size in zip(got, sizes, strict=True))
    if stopping == "first_exhausted":
        assert all(n <= size for n, size in zip(got, sizes, strict=True))
    else:
        assert all(n >= size for n, size in zip(got, sizes, strict=True))


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
