"""Ray hands every rank the very blocks that the rank would prepare for itself."""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import pairwise

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayswift.data.blocks import local_blocks
from rayswift.data.ledger import Ledger
from rayswift.data.stream import StreamPlan
from rayswift.models.loading import load_tokenizer
from tests.data_cases import make_tokenizer, pairs, plan_of, write_jsonl

pytestmark = [
    pytest.mark.ray,
    # ray 2.60 warns of an attribute that its own DataContext sets
    pytest.mark.filterwarnings("ignore:.use_push_based_shuffle. is deprecated:DeprecationWarning"),
]
BATCH = 8


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> StreamPlan:
    path = write_jsonl(tmp_path_factory.mktemp("rows") / "a.jsonl", [*pairs(300), "{"])
    return plan_of(path, chunk_rows=32, max_length=64, epochs=2)


def through_ray(plan: StreamPlan, tokenizer_dir: str, size: int, ledger: Ledger) -> list[list[pa.Table]]:
    """The blocks of each rank, all ranks reading at the same time, as training workers do."""
    from rayswift.data.pipeline import read_shares, split_stream

    splits = split_stream(plan, tokenizer_dir, ledger=ledger, global_batch_size=BATCH, data_size=size, num_workers=2)
    found: list[list[pa.Table]] = [[] for _ in splits]

    def read(rank: int) -> None:
        found[rank] += read_shares(splits[rank], global_batch_size=BATCH, data_size=size)

    readers = [threading.Thread(target=read, args=(rank,)) for rank in range(size)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(timeout=120)
        assert not reader.is_alive()
    return [[block for block in blocks if block.num_rows] for blocks in found]


def alone(plan: StreamPlan, tokenizer_dir: str, size: int, ledger: Ledger) -> list[list[pa.Table]]:
    tokenizer = load_tokenizer(tokenizer_dir)
    return [
        list(local_blocks(plan, tokenizer, data_rank=r, data_size=size, global_batch_size=BATCH, ledger=ledger))
        for r in range(size)
    ]


@pytest.mark.usefixtures("ray_local")
def test_blocks_through_ray_are_the_local_blocks(plan: StreamPlan, tokenizer_dir: str) -> None:
    start = Ledger.start(plan.fingerprint)
    for size, ledger in [
        (1, start),
        (2, start),
        (2, replace(start, chunk=3, sequence=2)),
        (1, replace(start, chunk=-1, rows_visited=301)),
    ]:
        expected = alone(plan, tokenizer_dir, size, ledger)
        found = through_ray(plan, tokenizer_dir, size, ledger)
        assert [[b.to_pylist() for b in blocks] for blocks in found] == [
            [b.to_pylist() for b in blocks] for blocks in expected
        ]
        assert expected[0]
    ended = replace(start, chunk=plan.num_chunks)
    assert through_ray(plan, tokenizer_dir, 2, ended) == [[], []]


@pytest.mark.usefixtures("ray_local")
def test_the_callers_context_is_left_alone(tokenizer_dir: str, plan: StreamPlan) -> None:
    from ray.data import DataContext

    from rayswift.data.pipeline import stream_dataset

    before = DataContext.get_current()
    dataset = stream_dataset(
        plan, tokenizer_dir, ledger=Ledger.start(plan.fingerprint), global_batch_size=8, data_size=1
    )
    assert DataContext.get_current() is before
    assert not before.execution_options.preserve_order
    assert dataset.context.execution_options.preserve_order
    assert dataset.context.execution_no_progress_timeout_s == -1


@given(st.integers(0, 3), st.integers(0, 30_000), st.booleans())
def test_tasks_cover_the_chunks_in_order(start: int, count: int, at_once: bool) -> None:
    from rayswift.data.pipeline import _CHUNKS_PER_TASK, _MAX_TASKS, _borders

    borders = _borders(range(start, start + count), at_once=at_once)
    sizes = [after - before for before, after in pairwise(borders)]
    assert (borders[0], borders[-1]) == (start, start + count)
    assert all(1 <= size <= max(_CHUNKS_PER_TASK if at_once else 1, -(-count // _MAX_TASKS)) for size in sizes)
    assert set(sizes[:2] + sizes[-2:]) <= {1}
