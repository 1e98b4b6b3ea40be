"""Weights in oneDNN's layout: the model computes what it computed before, or stays as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from rayswift.models.init import random_model
from rayswift.serving.engine import Prompt
from rayswift.serving.local.batch import Prefill, open_batch
from rayswift.serving.local.packing import PackedLinear, pack


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _model(arch: str = "qwen3", **given: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
             "intermediate_size": 96, "vocab_size": 300} | given  # fmt: skip
    return random_model(AutoConfig.for_model(arch, **sizes), seed=0).eval()


def _packed(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]


@torch.inference_mode()
def _decoded(model: PreTrainedModel, num_rows: int) -> torch.Tensor:
    """Logits_BV of rows of different lengths, decoded together."""
    batch = open_batch(model)
    for row in range(num_rows):
        prefill = Prefill(model, Prompt(tuple(range(3, 9 + 5 * row))))
        assert prefill.advance() is not None
        batch.join(prefill.cache)
    return batch.decode(list(range(20, 20 + num_rows)))


@pytest.mark.parametrize("arch", ["qwen3", "qwen2", "llama"])  # qwen2 has biases
@pytest.mark.parametrize("num_rows", [1, 8])
def test_a_packed_model_decodes_what_it_decoded(arch: str, num_rows: int) -> None:
    model = _model(arch)
    before_BV = _decoded(model, num_rows)
    assert pack(model) == len(_packed(model)) == 7 * 2 + 1
    after_BV = _decoded(model, num_rows)
    assert (after_BV - before_BV).abs().max() <= 1e-5 * before_BV.abs().max()


def test_embeddings_that_the_head_shares_are_still_read() -> None:
    model = _model(tie_word_embeddings=True)
    before_BV = _decoded(model, 2)
    assert pack(model)
    assert model.get_input_embeddings().weight.layout == torch.strided
    assert model.get_output_embeddings().weight.is_mkldnn
    torch.testing.assert_close(_decoded(model, 2), before_BV, rtol=0, atol=1e-5)


def test_one_thread_and_half_types_gain_nothing() -> None:
    assert pack(_model().to(torch.bfloat16)) == 0
    torch.set_num_threads(1)
    model = _model()
    assert pack(model) == 0
    assert not _packed(model)


def test_what_something_stands_before_is_left() -> None:
    """Quantized layers, and those that accelerate moves: both wrap what they stand before."""
    model: Any = _model()
    first, second = model.model.layers[0].mlp.up_proj, model.model.layers[1].mlp.up_proj
    first.register_forward_pre_hook(lambda *_: None)
    second.forward = second.forward
    before_BV = _decoded(model, 2)
    assert pack(model) == 7 * 2 + 1 - 2
    assert model.model.layers[0].mlp.up_proj is first
    assert model.model.layers[1].mlp.up_proj is second
    torch.testing.assert_close(_decoded(model, 2), before_BV, rtol=0, atol=1e-5)


def _wrong(self: PackedLinear, rows: torch.Tensor) -> torch.Tensor:
    return rows.new_ones(*rows.shape[:-1], self.weight.shape[0])


def _not_a_number(self: PackedLinear, rows: torch.Tensor) -> torch.Tensor:
    return _wrong(self, rows) * torch.nan


def _missing(self: PackedLinear, rows: torch.Tensor) -> torch.Tensor:
    raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")


@pytest.mark.parametrize(("forward", "told"), [(_wrong, "logits are off by"), (_not_a_number, "logits are off by nan"),
                                               (_missing, "has no attribute")])  # fmt: skip
def test_a_product_that_is_another_is_given_up_for_the_models_own(
    forward: Any, told: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = _model("qwen2")
    before_BV = _decoded(model, 2)
    monkeypatch.setattr(PackedLinear, "forward", forward)
    assert pack(model) == 0
    assert not _packed(model)
    assert torch.equal(_decoded(model, 2), before_BV)
    assert told in caplog.text


def test_a_model_that_reads_a_weight_itself_stays_as_it_was() -> None:
    model: Any = _model()
    head = model.lm_head

    class Reads(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **given: Any) -> Any:
            found = super().forward(*args, **given)
            assert torch.isfinite(self.lm_head.weight.sum())
            return found

    model.__class__ = Reads
    assert pack(model) == 0
    assert torch.equal(model.lm_head.weight, head.weight)
