"""Ranks share the same stream: global batches do not depend on their number, and a resume loses and repeats nothing."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, takewhile
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from rayswift.data.blocks import local_blocks, step_inputs
from rayswift.data.ledger import Ledger
from rayswift.data.stream import StreamPlan
from rayswift.data.types import StepInput
from tests.data_cases import make_tokenizer, pairs, plan_of, write_jsonl

TOKENIZER = make_tokenizer()
BATCH = 8


@pytest.fixture
def plan(tmp_path: Path) -> StreamPlan:
    rows = [*pairs(150), "{", *pairs(3), {"question": "q"}]
    return plan_of(write_jsonl(tmp_path / "a.jsonl", rows), chunk_rows=32, max_length=64, epochs=2)


def shares(plan: StreamPlan, rank: int, size: int, ledger: Ledger | None = None, micro: int = 3) -> Iterator[StepInput]:
    return step_inputs(
        blocks(plan, rank, size, ledger), sequences_per_step=BATCH // size, micro_batch_size=micro, pad_id=0
    )


def blocks(plan: StreamPlan, rank: int, size: int, ledger: Ledger | None = None) -> Iterator[pa.Table]:
    ledger = ledger or Ledger.start(plan.fingerprint)
    return local_blocks(plan, TOKENIZER, data_rank=rank, data_size=size, global_batch_size=BATCH, ledger=ledger)


def steps_of(plan: StreamPlan, size: int, ledger: Ledger | None = None) -> list[list[list[int]]]:
    """The input ids of every sequence, per step, in rank order."""
    per_rank = [list(blocks(plan, rank, size, ledger)) for rank in range(size)]
    steps = []
    for step in range(max(map(len, per_rank))):
        tables = [ranks[step] for ranks in per_rank if step < len(ranks)]
        steps.append([ids for table in tables for ids in table.column("input_ids").to_pylist()])
    return steps


@pytest.mark.parametrize("size", [2, 4, 8])
def test_global_batches_do_not_depend_on_the_number_of_ranks(plan: StreamPlan, size: int) -> None:
    assert steps_of(plan, size) == steps_of(plan, 1)


def train(plan: StreamPlan, size: int, ledger: Ledger, num_steps: int) -> Ledger:
    """The ledger after some steps, advanced as the training loop does."""
    ranks = [shares(plan, rank, size, ledger) for rank in range(size)]
    for _ in range(num_steps):
        step = [next(rank) for rank in ranks]
        if not any(share.num_sequences for share in step):
            break
        ledger = ledger.advanced(
            position=step[-1].position,
            rows_visited=sum(share.num_rows_visited for share in step),
            rows_trained=sum(share.num_rows for share in step),
            rows_quarantined=sum(len(share.bad_rows) for share in step),
            tokens=sum(share.num_tokens for share in step),
        )
    return ledger


@pytest.mark.parametrize("done", [0, 1, 3, 6])
def test_a_resume_on_other_ranks_continues_the_same_steps(plan: StreamPlan, done: int) -> None:
    whole = steps_of(plan, 1)
    ledger = train(plan, 2, Ledger.start(plan.fingerprint), done)
    assert steps_of(plan, 4, ledger) == whole[done:]


def test_the_ledger_accounts_for_every_row(plan: StreamPlan) -> None:
    for size in (1, 2):
        ended = train(plan, size, Ledger.start(plan.fingerprint), 10_000)
        assert (ended.rows_visited, ended.rows_trained, ended.rows_quarantined) == (310, 306, 4)
        assert plan.position(ended)[0] == plan.num_chunks
        assert steps_of(plan, size, ended) == []


def test_nothing_before_the_ledger_is_read_again(plan: StreamPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    from rayswift.data import chunks as module

    ledger = train(plan, 1, Ledger.start(plan.fingerprint), 4)
    prepared: list[int] = []
    real = module.kept_chunk
    monkeypatch.setattr(module, "kept_chunk", lambda p, i, t, m: (prepared.append(i), real(p, i, t, m))[1])
    list(blocks(plan, 0, 1, ledger))
    assert prepared == list(range(ledger.chunk, plan.num_chunks))
    assert ledger.chunk > 0


def test_every_share_has_the_same_number_of_micro_batches_and_the_end_is_endless(plan: StreamPlan) -> None:
    found = list(islice(shares(plan, 1, 2), 200))
    assert {len(share.micro_batches) for share in found} == {2}
    assert [share.num_sequences for share in found[-3:]] == [0, 0, 0]
    assert found[-1].position is None
    full = list(takewhile(lambda share: share.position is not None, found))
    assert all(share.num_sequences == 4 for share in full)
    tokens = sum(int((batch.input_ids_BT != 0).sum()) for share in found for batch in share.micro_batches)
    assert tokens == sum(share.num_tokens for share in found)


def test_weights_are_the_loss_mask(plan: StreamPlan) -> None:
    (table,) = islice(blocks(plan, 0, 1), 1)
    (share,) = islice(shares(plan, 0, 1), 1)
    trained = sum(map(sum, table.column("loss_mask").to_pylist()))
    assert sum(float(batch.weights_BT.sum()) for batch in share.micro_batches) == trained
    assert torch.is_tensor(share.micro_batches[0].weights_BT)
