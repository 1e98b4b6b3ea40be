"""The learning rate, against numbers worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayswift.config.job import TrainSpec
from rayswift.training.schedule import learning_rate


@pytest.mark.parametrize(
    ("schedule", "progress", "expected"),
    [
        ("cosine", 0.0, 1.0), ("cosine", 1 / 3, 0.75), ("cosine", 0.5, 0.5), ("cosine", 1.0, 0.0), ("cosine", 1.5, 0.0),
        ("linear", 0.0, 1.0), ("linear", 0.25, 0.75), ("linear", 1.0, 0.0), ("linear", 1.5, 0.0),
        ("constant", 0.0, 1.0), ("constant", 1.0, 1.0),
    ],
)  # fmt: skip
def test_shape(schedule: str, progress: float, expected: float) -> None:
    train = TrainSpec(lr=2e-3, schedule=schedule)  # type: ignore[arg-type]
    assert learning_rate(train, 7, progress) == pytest.approx(2e-3 * expected, abs=1e-12)


@pytest.mark.parametrize(("step", "expected"), [(1, 0.2), (2, 0.4), (4, 0.8), (5, 1.0), (6, 1.0)])
def test_warmup_rises_in_even_steps_and_ends(step: int, expected: float) -> None:
    train = TrainSpec(lr=1.0, schedule="constant", warmup_steps=4)
    assert learning_rate(train, step, 0.0) == pytest.approx(expected)


def test_the_rate_ends_at_its_minimum() -> None:
    train = TrainSpec(lr=1.0, schedule="cosine", min_lr_ratio=0.1)
    assert learning_rate(train, 9, 1.0) == pytest.approx(0.1)
    assert learning_rate(train, 9, 0.5) == pytest.approx(0.55)


@given(
    st.sampled_from(["cosine", "linear", "constant"]), st.integers(0, 50), st.floats(0, 1), st.integers(1, 100),
    st.floats(0, 1),
)  # fmt: skip
def test_the_rate_stays_between_zero_and_its_peak(
    schedule: str, warmup: int, ratio: float, step: int, progress: float
) -> None:
    train = TrainSpec(lr=3e-4, schedule=schedule, warmup_steps=warmup, min_lr_ratio=ratio)  # type: ignore[arg-type]
    assert 0 <= learning_rate(train, step, progress) <= 3e-4 * (1 + 1e-9)


@given(st.sampled_from(["cosine", "linear"]), st.floats(0, 1), st.floats(0, 1))
def test_the_rate_never_rises_after_the_warmup(schedule: str, a: float, b: float) -> None:
    train = TrainSpec(lr=1.0, schedule=schedule)  # type: ignore[arg-type]
    assert learning_rate(train, 1, max(a, b)) <= learning_rate(train, 1, min(a, b)) + 1e-12
