"""DeepSpeed's compiled extension: what is told where it cannot be built, and what a killed build leaves behind."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from rayswift.errors import ConfigError
from rayswift.parallel import deepspeed_ops
from rayswift.parallel.zero_state import deal


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment in which nothing is built."""
    monkeypatch.setattr(deepspeed_ops, "folder", lambda: tmp_path / "ops")
    return tmp_path / "ops"


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_a_run_that_needs_it_says_how_to_build_it(empty: Path) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.nvme needs .*async_io.* run `python -m rayswift\.parallel\.deep"):
        deepspeed_ops.load_ops()
    assert not empty.exists()


def test_without_a_compiler_the_build_is_skipped_with_the_reason(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert deepspeed_ops.build().startswith("skipped: no C++ compiler 'no-such-compiler', so no offload to NVMe")


def test_without_the_headers_it_names_the_package(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")  # a compiler that finds nothing
    assert "apt install libaio-dev" in deepspeed_ops.build()


def test_a_lock_of_a_killed_build_is_removed(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(empty, "async_io/lock", "pin_memory/pin_memory.so")
    monkeypatch.setattr(deepspeed_ops, "_has_header", lambda *_: True)
    monkeypatch.setenv("CXX", "true")
    monkeypatch.setattr(deepspeed_ops, "_compile", lambda: write(empty, "async_io/async_io.so"))
    assert deepspeed_ops.missing() == ["async_io"]
    assert deepspeed_ops.build().startswith("built in 0 s")
    assert not (empty / "async_io" / "lock").exists()
    assert deepspeed_ops.build().startswith("DeepSpeed's extensions are there already")


def test_of_its_warnings_those_that_are_meant_so_are_dropped() -> None:
    def record(text: str) -> logging.LogRecord:
        return logging.LogRecord("DeepSpeed", logging.WARNING, "", 0, text, None, None)

    assert not deepspeed_ops._is_news(record("[Rank 0] [deepspeed] OVERFLOW! Skipping step. Gradients are non-finite"))
    assert deepspeed_ops._is_news(record("pytorch allocator cache flushes since last step"))


def test_tensors_are_dealt_out_evenly_and_each_once() -> None:
    sizes = {"head": 40, "table": 40, "up": 20, "down": 20, "norm": 1}
    owner = deal(sizes, 2)
    assert owner.keys() == sizes.keys()
    assert sorted(sum(sizes[name] for name in sizes if owner[name] == rank) for rank in (0, 1)) == [60, 61]
