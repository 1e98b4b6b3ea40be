"""Precision: the loss scale of float16, and matrices in FP8."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from rayswift.errors import ConfigError
from rayswift.parallel.precision import LossScale, compute_dtype, use_float8
from tests.engine_cases import tiny_model


def test_an_overflow_halves_the_scale_and_many_good_steps_double_it() -> None:
    scale = LossScale(value=8.0, growth_interval=3)
    scale.update(finite=False)
    assert scale.value == 4.0
    for _ in range(2):
        scale.update(finite=True)
    assert scale.value == 4.0
    scale.update(finite=True)
    assert (scale.value, scale.good_steps) == (8.0, 0)


def test_the_scale_has_a_floor_and_a_ceiling() -> None:
    low, high = LossScale(value=1.0), LossScale(value=2.0**24, growth_interval=1)
    low.update(finite=False)
    high.update(finite=True)
    assert (low.value, high.value) == (1.0, 2.0**24)


def test_a_scale_goes_into_a_checkpoint_and_out_again() -> None:
    scale, other = LossScale(value=512.0, good_steps=7), LossScale()
    other.load(scale.state())
    assert (other.value, other.good_steps) == (512.0, 7)


def test_float8_keeps_the_rest_in_bfloat16() -> None:
    assert compute_dtype("float8") == torch.bfloat16
    assert compute_dtype("float16") == torch.float16


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is installed")
def test_without_torchao_the_extra_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model.dtype=float8 needs torchao.*rayswift\[fp8\]"):
        use_float8(tiny_model())


def test_the_blocks_matrices_are_in_fp8_and_the_head_is_not() -> None:
    pytest.importorskip("torchao", reason="pip install 'rayswift[fp8]'")
    model = tiny_model()
    use_float8(model, emulate=True)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["model.layers.0.mlp.up_proj"] == "Float8Linear"
    assert kinds["lm_head"] == "Linear"
    ids = torch.arange(3, 19)[None]
    exact = tiny_model()(input_ids=ids).logits
    assert model(input_ids=ids).logits.detach().numpy() == pytest.approx(exact.detach().numpy(), abs=0.5)
