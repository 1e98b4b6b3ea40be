"""Every method: its Config refuses what it does not know, its loss is a sum, and splitting a batch changes nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rayswift import plugins
from rayswift.data.types import PackedBatch

METHODS = plugins.names("methods")
NEEDS = {"reference", "rollout", "scalar_head"}


def make(name: str) -> Any:
    method = plugins.load("methods", name)
    return method(method.Config())


def batch_of(weights: np.ndarray) -> PackedBatch:
    zeros = torch.zeros(weights.shape, dtype=torch.int64)
    return PackedBatch(zeros, zeros, zeros, torch.from_numpy(weights.astype(np.float32)))


def random_batch(rows: int, length: int, seed: int) -> tuple[torch.Tensor, PackedBatch]:
    random = np.random.default_rng(seed)
    logprobs = torch.from_numpy(-random.exponential(2.0, (rows, length)).astype(np.float32))
    return logprobs, batch_of(random.choice([0.0, 0.0, 1.0, 0.5], (rows, length)))


def nll(logprobs: torch.Tensor, batch: PackedBatch) -> float:
    """The weighted negative log-likelihood, token by token."""
    total = 0.0
    for logprob_row, weight_row in zip(logprobs.tolist(), batch.weights_BT.tolist(), strict=True):
        for logprob, weight in zip(logprob_row, weight_row, strict=True):
            total -= weight * logprob
    return total


REFERENCES = {"sft": nll, "pretrain": nll}


def test_every_method_has_a_reference_loss() -> None:
    assert set(METHODS) == set(REFERENCES), "write the new method's loss down independently, in REFERENCES"


@pytest.mark.parametrize("name", METHODS)
def test_config_forbids_unknown_options(name: str) -> None:
    with pytest.raises(ValidationError, match="no_such_option"):
        plugins.load("methods", name).Config.model_validate({"no_such_option": 1})


@pytest.mark.parametrize("name", METHODS)
def test_needs_and_rendering_are_declared(name: str) -> None:
    method = plugins.load("methods", name)
    assert isinstance(method.needs, frozenset)
    assert method.needs <= NEEDS
    assert method.rendering in ("text", "chat")


@pytest.mark.parametrize("name", METHODS)
def test_count_is_the_sum_of_the_weights(name: str) -> None:
    _, batch = random_batch(3, 17, seed=1)
    count = make(name).count(batch)
    assert count.ndim == 0
    assert float(count) == math.fsum(batch.weights_BT.flatten().tolist())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("seed", range(3))
def test_loss_equals_a_reference_written_down_by_hand(name: str, seed: int) -> None:
    logprobs, batch = random_batch(4, 13, seed)
    loss = make(name).loss(logprobs, batch)
    assert loss.ndim == 0
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(REFERENCES[name](logprobs, batch), rel=1e-5)
    assert float(loss) > 0


@pytest.mark.parametrize("name", METHODS)
def test_tokens_that_weigh_nothing_get_no_gradient(name: str) -> None:
    logprobs, batch = random_batch(2, 9, seed=5)
    logprobs.requires_grad_(True)
    make(name).loss(logprobs, batch).backward()
    assert logprobs.grad is not None
    assert torch.equal(logprobs.grad != 0, batch.weights_BT != 0)


@pytest.mark.parametrize("name", METHODS)
@given(rows=st.integers(1, 9), length=st.integers(1, 12), seed=st.integers(0, 999), data=st.data())
def test_loss_and_count_do_not_depend_on_the_micro_batch_split(
    name: str, rows: int, length: int, seed: int, data: st.DataObject
) -> None:
    method = make(name)
    logprobs, batch = random_batch(rows, length, seed)
    cuts = sorted(data.draw(st.sets(st.integers(1, rows - 1))) if rows > 1 else ())
    loss = count = 0.0
    for start, end in zip([0, *cuts], [*cuts, rows], strict=True):
        part = batch_of(batch.weights_BT[start:end].numpy())
        loss += float(method.loss(logprobs[start:end], part))
        count += float(method.count(part))
    assert loss == pytest.approx(float(method.loss(logprobs, batch)), rel=1e-5, abs=1e-5)
    assert count == float(method.count(batch))
