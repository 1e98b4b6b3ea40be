"""With the layout of a chunk only what is left of it is prepared, and it is what it would have been."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayswift.config.job import DataSource
from rayswift.data import prepare
from rayswift.data.blocks import head_start, local_blocks
from rayswift.data.chunk_layout import ChunkLayout
from rayswift.data.ledger import Ledger
from rayswift.data.prepare import prepare_chunk, prepare_part
from rayswift.data.stream import StreamPlan
from rayswift.errors import DataError
from tests.data_cases import make_tokenizer, pairs, plan_of, write_jsonl

TOKENIZER = make_tokenizer()


def make_plan(folder: Path, **settings: Any) -> StreamPlan:
    """Chunks of 48 rows: bad ones, repeated ones, and one that is split."""
    rows = [*pairs(100), "{", {"question": "long?", "answer": "word " * 100}, *pairs(20)]
    source = DataSource(path=str(write_jsonl(folder / "a.jsonl", rows)), weight=1.5)
    return plan_of(source, **({"chunk_rows": 48, "max_length": 48, "truncation": "split"} | settings))


@pytest.mark.parametrize("packing", [True, False])
def test_a_part_is_the_same_part_of_the_whole(tmp_path: Path, packing: bool) -> None:
    plan = make_plan(tmp_path, packing=packing)
    for index in range(plan.num_chunks):
        whole = prepare_chunk(plan, index, TOKENIZER)
        layout = ChunkLayout.from_json(whole.column("layout")[0].as_py())
        assert ChunkLayout.from_json(layout.to_json()) == layout
        assert (layout.chunk, len(layout.sequences)) == (index, whole.num_rows)
        assert whole.column("layout").null_count == whole.num_rows - 1
        for first, stop in ((1, 4), (whole.num_rows // 2, whole.num_rows), (whole.num_rows - 1, whole.num_rows)):
            part = prepare_part(plan, layout, range(first, stop), TOKENIZER)
            assert part.equals(whole.slice(first, stop - first).combine_chunks())


@pytest.mark.parametrize("sequence", [1, 3, 7])
def test_a_head_start_in_a_chunk_prepares_little_and_leaves_the_rest(
    tmp_path: Path, sequence: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayswift.data.chunks.FIRST_CHUNK_ROWS", 6)
    plan = make_plan(tmp_path)
    text = prepare_chunk(plan, 1, TOKENIZER).column("layout")[0].as_py()
    ledger = replace(Ledger.start(plan.fingerprint), chunk=1, sequence=sequence)
    settings: dict[str, Any] = {"data_rank": 0, "data_size": 1, "global_batch_size": 2}
    expected = [b.to_pylist() for b in local_blocks(plan, TOKENIZER, ledger=ledger, **settings)]
    counts: list[int] = []
    documents = prepare._documents

    def counted(plan: StreamPlan, rows: Any, *others: Any) -> Any:
        counts.append(len(rows))
        return documents(plan, rows, *others)

    monkeypatch.setattr(prepare, "_documents", counted)
    head, rest = head_start(plan, TOKENIZER, ledger=replace(ledger, layout=text), **settings)
    assert head
    assert counts[0] <= 10
    assert rest.layout == text
    found = [*head, *local_blocks(plan, TOKENIZER, ledger=rest, **settings)]
    assert [block.to_pylist() for block in found] == expected
    assert sum(counts[:2]) <= 48, "each row that is left is tokenized once"


def test_a_fresh_head_start_hands_on_the_layout(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    settings: dict[str, Any] = {"data_rank": 0, "data_size": 1, "global_batch_size": 4}
    start = Ledger.start(plan.fingerprint)
    head, rest = head_start(plan, TOKENIZER, ledger=start, **settings)
    assert rest.layout is not None
    assert rest == replace(rest, layout=None), "it is no part of where a run stands"
    found = [*head, *local_blocks(plan, TOKENIZER, ledger=rest, **settings)]
    expected = list(local_blocks(plan, TOKENIZER, ledger=start, **settings))
    assert [b.to_pylist() for b in found] == [b.to_pylist() for b in expected]


def test_another_tokenizer_than_that_of_the_layout_is_told(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    with_long = next(
        i for i in range(plan.num_chunks) if '"sequences"' in _text(plan, i) and _has_pieces(_text(plan, i))
    )
    layout = ChunkLayout.from_json(_text(plan, with_long))
    other = make_tokenizer(corpus=("word " * 50,), vocab_size=900)
    with pytest.raises(DataError, match="the tokenizer or media have changed"):
        prepare_part(plan, layout, range(len(layout.sequences)), other)


def _text(plan: StreamPlan, index: int) -> str:
    text: str = prepare_chunk(plan, index, TOKENIZER).column("layout")[0].as_py()
    return text


def _has_pieces(text: str) -> bool:
    return any(piece > 1 for one in ChunkLayout.from_json(text).sequences for _, piece in one)
