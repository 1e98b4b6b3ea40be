"""A chunk as a table: every row accounted for, bad rows named, the same table every time."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rayswift.config.job import DataSource
from rayswift.data.prepare import SCHEMA, prepare_chunk
from rayswift.data.stream import StreamPlan
from tests.data_cases import make_tokenizer, pairs, plan_of, write_jsonl

TOKENIZER = make_tokenizer()


def tables(plan: StreamPlan) -> list[pa.Table]:
    return [prepare_chunk(plan, i, TOKENIZER) for i in range(plan.num_chunks)]


def flat(found: list[pa.Table], name: str) -> list[Any]:
    return [value for table in found for one in table.column(name).to_pylist() for value in one]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_is_trained_or_quarantined_once(tmp_path: Path, packing: bool, shuffle: bool) -> None:
    rows = [*pairs(90), "not json", {"question": "q"}, {"question": "q", "answer": 3}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    plan = plan_of(path, chunk_rows=40, packing=packing, shuffle=shuffle, max_length=64, epochs=2)
    found = tables(plan)
    assert all(table.schema == SCHEMA for table in found)
    keys = Counter(key for key in flat(found, "rows") if key >= 0)
    assert keys == dict.fromkeys(range(90), 2)
    bad = Counter((row["line"], row["reason"]) for row in map(json.loads, flat(found, "bad")))
    assert {(line, count) for (line, _), count in bad.items()} == {(91, 2), (92, 2), (93, 2)}
    assert sum(sum(table.column("visited").to_pylist()) for table in found) == plan.num_rows_total == 186
    for table in found:
        for row in table.to_pylist():
            assert sum(row["lengths"]) == len(row["input_ids"]) == len(row["loss_mask"]) <= 64
            assert len(row["lengths"]) == len(row["rows"]) == (len(row["rows"]) if packing else 1)
        assert table.column("sequence").to_pylist() == list(range(table.num_rows))
        assert set(table.column("num_sequences").to_pylist()) == {table.num_rows}


def test_order_is_the_files_without_shuffle_and_seeded_with_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", pairs(50))
    plain = flat(tables(plan_of(path, shuffle=False, packing=False)), "rows")
    assert plain == list(range(50))
    one, two = plan_of(path, seed=1, packing=False), plan_of(path, seed=2, packing=False)
    assert tables(one)[0].equals(tables(one)[0])
    assert flat(tables(one), "rows") not in (plain, flat(tables(two), "rows"))


def test_a_chunk_of_bad_rows_is_one_empty_sequence(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*pairs(4), *["{"] * 4])
    plan = plan_of(path, chunk_rows=4, shuffle=False)
    (row,) = tables(plan)[1].to_pylist()
    assert (row["input_ids"], row["lengths"], row["visited"], len(row["bad"])) == ([], [], 4, 4)


def test_weights_repeat_rows_and_take_a_seeded_part(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", pairs(40)) for name in "ab"]
    sources = [DataSource(path=str(path), weight=weight) for path, weight in zip(paths, (2, 0.25), strict=True)]
    plan = plan_of(*sources, chunk_rows=16, epochs=2)
    chunks = [prepare_chunk(plan, i, TOKENIZER) for i in range(plan.num_chunks)]
    epochs: list[Counter[int]] = [Counter(), Counter()]
    for i, table in enumerate(chunks):
        epochs[plan.chunk(i).epoch].update(flat([table], "rows"))
    for keys in epochs:
        assert {key: count for key, count in keys.items() if key < 1 << 40} == dict.fromkeys(range(40), 2)
        assert sum(key >= 1 << 40 for key in keys) == 10
    assert {key for key in epochs[0] if key >= 1 << 40} != {key for key in epochs[1] if key >= 1 << 40}


def test_a_split_row_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("many words " * 60 + "\nshort\n")
    table = prepare_chunk(plan_of(path, max_length=32, rendering="text"), 0, TOKENIZER)
    keys = flat([table], "rows")
    assert sorted(key for key in keys if key >= 0) == [0, 1]
    assert {~key for key in keys if key < 0} == {0}
    assert table.column("visited").to_pylist() == [
        2 * (i + 1) // table.num_rows - 2 * i // table.num_rows for i in range(table.num_rows)
    ]


@pytest.mark.parametrize(
    ("name", "unit", "num_rows"),
    [("wiki_demo.txt", "line", 30), ("c4_demo.jsonl", "line", 300), ("wiki_demo.txt", "document", 1)],
)
def test_real_text_is_conserved(shared_data: Path, name: str, unit: str, num_rows: int) -> None:
    source = DataSource(path=str(shared_data / "llamafactory_demo" / name), text_unit=unit)  # type: ignore[arg-type]
    plan = plan_of(source, max_length=512, rendering="text", shuffle=False, packing=False)
    found = tables(plan)
    assert sum(key >= 0 for key in flat(found, "rows")) == plan.rows_per_epoch == num_rows
    text = str(TOKENIZER.decode(flat(found, "input_ids"), skip_special_tokens=True))
    raw = Path(source.path).read_text(encoding="utf-8")
    words = raw if name.endswith(".txt") else "".join(json.loads(line)["text"] for line in raw.splitlines())
    assert "".join(text.split()) == "".join(words.split())


def test_gsm8k_fills_sequences_over_99_percent(shared_data: Path) -> None:
    """With a vocabulary that suits the text: 173 tokens a row, as common tokenizers have it."""
    plan = plan_of(shared_data / "gsm8k" / "train.jsonl")
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:2000]
    table = prepare_chunk(plan, 1, make_tokenizer(corpus=tuple(lines), vocab_size=4096))
    assert sum(flat([table], "lengths")) / (table.num_rows * 1024) > 0.99
    assert not flat([table], "bad")


@pytest.mark.parametrize(("truncation", "cut"), [("right", [True, False]), ("left", [True, False]), ("split", None)])
def test_a_row_that_lost_tokens_says_so(tmp_path: Path, truncation: str, cut: list[bool] | None) -> None:
    rows = [{"question": "q", "answer": "long " * 80}, {"question": "q", "answer": "short"}]
    plan = plan_of(write_jsonl(tmp_path / "a.jsonl", rows), max_length=32, shuffle=False, truncation=truncation)
    table = prepare_chunk(plan, 0, TOKENIZER)
    found = [flag for key, flag in zip(flat([table], "rows"), flat([table], "cut"), strict=True) if key >= 0]
    assert found == (cut or [False, False])
    assert len(flat([table], "cut")) == len(flat([table], "rows"))


def test_bad_rows_have_their_keys_beside_them(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*pairs(3), "{", *pairs(2), "["])
    table = prepare_chunk(plan_of(path), 0, TOKENIZER)
    keys, bad = flat([table], "bad_rows"), [json.loads(text) for text in flat([table], "bad")]
    assert sorted(keys) == [3, 6]
    assert [row["row"] for row in bad] == keys
