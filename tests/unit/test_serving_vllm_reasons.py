"""Why a process of vLLM's did not start reaches the one that started it."""

from __future__ import annotations

import logging
import multiprocessing

from rayswift.serving.vllm import reasons


def _fail(words: str) -> None:
    reasons.keep_first_error()
    reasons.keep_first_error()  # vLLM loads its plugins more than once
    log = logging.getLogger("vllm.v1.engine.core")
    log.error("without an exception it is no reason")
    try:
        raise ValueError(words)
    except ValueError:
        log.exception("EngineCore failed to start.")


def _ran(words: str) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_fail, args=(words,))
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_the_first_error_is_told() -> None:
    with reasons.kept() as first:
        assert first() is None
        _ran("needs 3.5 GiB\n  and has 2")
        _ran("follows from it")
        assert first() == "needs 3.5 GiB and has 2"
    _ran("nobody asks any more")
    assert first() is None


def test_this_process_itself_is_left_alone() -> None:
    handlers = list(logging.getLogger("vllm").handlers)
    with reasons.kept():
        reasons.keep_first_error()
        assert logging.getLogger("vllm").handlers == handlers


def test_an_error_in_a_line() -> None:
    assert reasons.in_a_line(ValueError(" a\n b ")) == "a b"
    assert reasons.in_a_line(KeyError()) == "KeyError"
    assert len(reasons.in_a_line(ValueError("x" * 900))) == 400
