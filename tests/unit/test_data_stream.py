"""The stream is a pure function: the same inputs give the same chunks, other inputs another fingerprint."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from rayswift.config.job import DataSource
from rayswift.data.ledger import END, Ledger
from rayswift.data.mixing import quotas
from tests.data_cases import pairs, plan_of, write_jsonl


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "a.jsonl", pairs(1000))


def test_more_epochs_only_make_the_stream_longer(rows_file: Path) -> None:
    short, long = plan_of(rows_file, chunk_rows=300), plan_of(rows_file, chunk_rows=300, epochs=3)
    assert short.fingerprint == long.fingerprint
    assert [short.chunk(i) for i in range(short.num_chunks)] == [long.chunk(i) for i in range(short.num_chunks)]
    assert long.num_rows_total == 3000
    with pytest.raises(IndexError, match="chunk"):
        short.chunk(short.num_chunks)


def test_epochs_are_in_different_orders_and_unshuffled_ones_are_not(rows_file: Path) -> None:
    for shuffle in (True, False):
        plan = plan_of(rows_file, chunk_rows=300, epochs=2, shuffle=shuffle)
        orders = [
            [part for i in range(plan.num_chunks) if (c := plan.chunk(i)).epoch == e for part in c.parts]
            for e in (0, 1)
        ]
        assert (orders[0] == orders[1]) is not shuffle


def test_the_first_chunk_of_a_long_run_is_small(rows_file: Path) -> None:
    plan = plan_of(rows_file, chunk_rows=512, epochs=2)
    sizes = [plan.chunk(i).num_rows for i in range(plan.num_chunks)]
    assert sizes[0] <= 256
    assert sum(sizes) == 2000
    assert plan_of(rows_file, chunk_rows=2048).num_chunks == 1


def test_large_rows_make_chunks_of_few_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayswift.data.stream.CHUNK_BYTES", 32 << 10)
    for i in range(6):
        (tmp_path / f"{i}.txt").write_bytes(b"x" * (20 << 10))
    plan = plan_of(DataSource(path=str(tmp_path), text_unit="document"))
    sizes = [plan.chunk(i).num_rows for i in range(plan.num_chunks)]
    assert sum(sizes) == 6
    assert max(sizes) <= 2


def test_the_fingerprint_follows_what_decides_the_stream(rows_file: Path, tmp_path: Path) -> None:
    base = plan_of(rows_file)
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(rows_file.read_bytes())
    assert plan_of(moved).fingerprint == base.fingerprint
    others = [
        plan_of(rows_file, seed=1),
        plan_of(rows_file, max_length=512),
        plan_of(rows_file, packing=False),
        plan_of(rows_file, shuffle=False),
        plan_of(rows_file, truncation="left"),
        plan_of(rows_file, rendering="text"),
        plan_of(DataSource(path=str(rows_file), limit=999)),
        plan_of(DataSource(path=str(rows_file), system="s")),
        plan_of(write_jsonl(rows_file, [*pairs(999), {"question": "q", "answer": "a"}])),
    ]
    assert len({base.fingerprint, *(plan.fingerprint for plan in others)}) == 10


def test_quotas_are_what_interleaving_comes_to() -> None:
    assert quotas([3, 4, 5], [1, 1, 1], "first_exhausted") == [3, 3, 3]
    assert quotas([3, 4, 5], [1, 1, 1], "all_exhausted") == [5, 5, 5]
    assert quotas([70, 30], [0.7, 0.3], "first_exhausted") == [70, 30]
    assert quotas([100, 10], [0.5, 0.5], "all_exhausted") == [100, 100]
    assert quotas([100, 10], [0.9, 0.1], "first_exhausted") == [90, 10]
    assert quotas([100, 10], [1.5, 2], "weights") == [150, 20]
    assert quotas([100, 0], [1, 1], "first_exhausted") == [100, 0]


@pytest.mark.parametrize(
    ("weight", "epochs", "rows"), [(0.5, 1, 20), (0.5, 2, 40), (0.5, 9, 40), (1.0, 2, 40), (2.0, 3, 80)]
)
def test_bad_rows_are_a_part_of_all_that_the_epochs_can_reach(
    tmp_path: Path, weight: float, epochs: int, rows: int
) -> None:
    source = DataSource(path=str(write_jsonl(tmp_path / "a.jsonl", pairs(40))), weight=weight)
    assert plan_of(source, epochs=epochs, chunk_rows=16).rows_at_stake == rows


def test_how_sources_are_mixed_is_part_of_the_stream(tmp_path: Path) -> None:
    large, small = write_jsonl(tmp_path / "a.jsonl", pairs(90)), write_jsonl(tmp_path / "b.jsonl", pairs(30))
    plans = {
        stopping: plan_of(large, small, mixing={"stopping": stopping}, chunk_rows=16, epochs=2)
        for stopping in ("weights", "first_exhausted", "all_exhausted")
    }
    assert [plan.rows_per_epoch for plan in plans.values()] == [120, 60, 180]
    assert len({plan.fingerprint for plan in plans.values()}) == 3
    undersampled = plans["first_exhausted"]
    again = pickle.loads(pickle.dumps(undersampled))
    assert [again.chunk(i) for i in range(again.num_chunks)] == [
        undersampled.chunk(i) for i in range(undersampled.num_chunks)
    ]


def test_a_plan_survives_pickling_and_stays_small(rows_file: Path) -> None:
    plan = plan_of(rows_file, chunk_rows=100, epochs=5)
    before = len(pickle.dumps(plan))
    chunks = [plan.chunk(i) for i in range(plan.num_chunks)]
    copy = pickle.loads(pickle.dumps(plan))
    assert [copy.chunk(i) for i in range(copy.num_chunks)] == chunks
    assert len(pickle.dumps(plan)) == before < 5000


def test_where_a_ledger_continues(rows_file: Path) -> None:
    plan = plan_of(rows_file, chunk_rows=300)
    start = Ledger.start(plan.fingerprint)
    assert plan.position(start) == (0, 0)
    middle = start.advanced(position=(2, 5), rows_visited=600, rows_trained=590, rows_quarantined=10, tokens=9000)
    assert plan.position(middle) == (2, 5)
    ended = middle.advanced(position=None, rows_visited=400, rows_trained=400, rows_quarantined=0, tokens=6000)
    assert ended == Ledger(plan.fingerprint, END, 0, 1000, 990, 10, 15000)
    assert plan.position(ended) == (plan.num_chunks, 0)
    assert replace(plan, epochs=2).position(ended) == (plan.num_chunks, 0)
    assert replace(plan, epochs=2).num_chunks > plan.num_chunks
    assert Ledger.from_dict(ended.to_dict()) == ended
