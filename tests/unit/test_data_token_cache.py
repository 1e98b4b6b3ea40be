"""The token cache: found where nothing has changed, never where anything has, and never trusted when it is damaged."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayswift.data import token_cache
from rayswift.data.stream import StreamPlan
from rayswift.data.token_cache import cache_key, kept_chunk
from tests.data_cases import CHATML, make_tokenizer, plan_of, write_jsonl

ROWS = [{"query": f"What is {i}?", "response": f"It is {i}."} for i in range(60)]


def plan_with(folder: Path, rows: list[dict[str, Any]] = ROWS, **changes: Any) -> StreamPlan:
    settings = {"rendering": "chat", "chunk_rows": 16, "max_length": 64, "cache": str(folder / "cache")}
    return plan_of(write_jsonl(folder / "rows.jsonl", rows), **settings | changes)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The chunks that were made, not found."""
    made: list[int] = []
    real = token_cache.prepare_chunk
    monkeypatch.setattr(token_cache, "prepare_chunk", lambda plan, i, *rest: (made.append(i), real(plan, i, *rest))[1])
    return made


def test_a_second_run_tokenizes_nothing_and_has_the_same_rows(tmp_path: Path, prepared: list[int]) -> None:
    plan, tokenizer = plan_with(tmp_path, epochs=2), make_tokenizer(CHATML)
    first = [kept_chunk(plan, index, tokenizer) for index in range(plan.num_chunks)]
    assert prepared == list(range(plan.num_chunks))
    again = plan_with(tmp_path, epochs=2)
    second = [kept_chunk(again, index, make_tokenizer(CHATML)) for index in range(plan.num_chunks)]
    assert prepared == list(range(plan.num_chunks)), "nothing was made again"
    assert first == second
    longer = plan_with(tmp_path, epochs=3)
    kept_chunk(longer, 0, tokenizer)
    assert len(prepared) == plan.num_chunks, "more epochs are no other rows"


CHANGES: dict[str, Callable[[Path], tuple[StreamPlan, Any]]] = {
    "a byte of the data": lambda folder: (
        plan_with(folder, [ROWS[0] | {"response": "It is 1."}, *ROWS[1:]]), make_tokenizer(CHATML)
    ),
    "the chat template": lambda folder: (
        plan_with(folder), make_tokenizer(CHATML.replace("assistant", "helper"))
    ),
    "the tokenizer": lambda folder: (plan_with(folder), make_tokenizer(CHATML, corpus=("other words",))),
    "the seed": lambda folder: (plan_with(folder, seed=1), make_tokenizer(CHATML)),
    "the length": lambda folder: (plan_with(folder, max_length=56), make_tokenizer(CHATML)),
    "packing": lambda folder: (plan_with(folder, packing=False), make_tokenizer(CHATML)),
    "what is trained": lambda folder: (plan_with(folder, loss="all"), make_tokenizer(CHATML)),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_stale_cache_is_never_used(tmp_path: Path, prepared: list[int], what: str) -> None:
    plan, tokenizer = plan_with(tmp_path), make_tokenizer(CHATML)
    kept_chunk(plan, 0, tokenizer)
    changed, other = CHANGES[what](tmp_path)
    assert cache_key(changed, other) != cache_key(plan, tokenizer)
    kept_chunk(changed, 0, other)
    assert prepared == [0, 0]


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: content[:-1] + b"x", lambda _: b""])
def test_a_damaged_file_is_made_again(
    tmp_path: Path, prepared: list[int], caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    plan, tokenizer = plan_with(tmp_path), make_tokenizer(CHATML)
    table = kept_chunk(plan, 0, tokenizer)
    (file,) = (tmp_path / "cache").rglob("*.arrow")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with caplog.at_level(logging.WARNING):
        assert kept_chunk(plan, 0, tokenizer) == table
    assert prepared == [0, 0]
    assert "damaged" in caplog.text
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, prepared: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        table = kept_chunk(plan_with(tmp_path), 0, make_tokenizer(CHATML))
    assert table.num_rows
    assert prepared == [0]
    assert "cannot be" in caplog.text


def test_without_a_cache_nothing_is_kept(tmp_path: Path, prepared: list[int]) -> None:
    plan = plan_with(tmp_path, cache=None)
    kept_chunk(plan, 0, make_tokenizer(CHATML))
    kept_chunk(plan, 0, make_tokenizer(CHATML))
    assert prepared == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0]) == ROWS[0]
