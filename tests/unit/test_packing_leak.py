"""Packed documents do not see each other, and the check that says so can fail.

The two ways they would, an attention mask of ones and a cache, are what a Hugging Face model is called with by default.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rayswift.data.types import PackedBatch
from rayswift.errors import ConfigError
from rayswift.parallel.engines.fsdp2 import Fsdp2
from rayswift.parallel.logprobs import token_logprobs
from rayswift.planning.layout import Layout, Seat
from rayswift.training.self_check import refuse_leaking_packing
from tests.engine_cases import Document, documents, share, tiny_model
from tests.job_cases import make_job

ARCHITECTURES = ["qwen3", "llama", "gpt2"]


def packed_and_alone(rows: list[Document]) -> tuple[PackedBatch, list[PackedBatch]]:
    """All documents as packed sequences, and each of them as a sequence of its own."""
    packed = share(rows, packing=True, micro_batches=1)[0]
    assert packed.input_ids_BT.shape[0] < len(rows), "several documents share a sequence"
    return packed, [share([row], packing=False, micro_batches=1)[0] for row in rows]


def largest_leak(logprobs: Any, rows: list[Document]) -> float:
    """How far a trained token's log-probability moves when its document is packed with others."""
    packed, alone = packed_and_alone(rows)
    together = logprobs(packed)
    found = {}
    for b, t in zip(*torch.nonzero(packed.weights_BT, as_tuple=True), strict=True):
        start = int(t - packed.position_ids_BT[b, t])
        first = tuple(packed.input_ids_BT[b, start : int(t) + 2].tolist())
        found[first] = float(together[b, t])
    differences = []
    for batch in alone:
        values = logprobs(batch)
        for t in torch.nonzero(batch.weights_BT[0]).flatten().tolist():
            differences.append(abs(found[tuple(batch.input_ids_BT[0, : t + 2].tolist())] - float(values[0, t])))
    assert len(differences) > 20
    return max(differences)


@pytest.fixture(scope="module")
def rows() -> list[Document]:
    return documents(8, seed=3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_packed_document_has_the_logprobs_it_has_alone(arch: str, attention: str, rows: list[Document]) -> None:
    model = tiny_model(arch)
    model.set_attn_implementation(attention)
    engine = Fsdp2(model, make_job(), Seat(Layout()), torch.device("cpu"))
    assert largest_leak(engine.forward, rows) < 1e-5
    refuse_leaking_packing(engine, make_job())


@pytest.mark.parametrize("leak", ["mask of ones", "cache", "no positions"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_check_fails_for_a_model_called_the_usual_way(arch: str, leak: str, rows: list[Document]) -> None:
    model = tiny_model(arch).eval()
    model.config.use_cache = True

    def logprobs(batch: PackedBatch) -> torch.Tensor:
        given: dict[str, Any] = {"position_ids": batch.position_ids_BT, "use_cache": leak == "cache"}
        if leak == "mask of ones":
            given["attention_mask"] = torch.ones_like(batch.input_ids_BT)
        if leak == "no positions":
            given.pop("position_ids")
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids_BT, **given).logits
        return token_logprobs(logits, batch.targets_BT)

    assert largest_leak(logprobs, rows) > 0.1


class LeakingEngine:
    """An engine whose log-probabilities depend on everything that came before in the sequence."""

    def __init__(self, strength: float) -> None:
        self._strength = strength

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        return -self._strength * batch.input_ids_BT.cumsum(1).float()


def test_a_leaking_engine_is_refused_with_the_setting_to_change() -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_leaking_packing(LeakingEngine(0.01), make_job())  # type: ignore[arg-type]
    assert str(caught.value).startswith("data.packing=True lets packed documents see each other in this model")
    assert str(caught.value).endswith("; set data.packing=false")


def test_rounding_is_no_leak() -> None:
    refuse_leaking_packing(LeakingEngine(1e-7), make_job())  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_random_model_in_any_precision_does_not_leak_and_is_caught_when_it_does(dtype: str) -> None:
    job = make_job(**{"model.dtype": dtype})
    engine = Fsdp2(tiny_model("qwen3"), job, Seat(Layout()), torch.device("cpu"))
    refuse_leaking_packing(engine, job)
    forward = engine._model.forward
    engine._model.forward = lambda **given: forward(**{**given, "position_ids": None})
    with pytest.raises(ConfigError, match=r"data\.packing=True"):
        refuse_leaking_packing(engine, job)


def test_the_engine_overrides_a_config_that_asks_for_a_cache(rows: list[Document]) -> None:
    model = tiny_model("qwen3")
    model.config.use_cache = True
    engine = Fsdp2(model, make_job(), Seat(Layout()), torch.device("cpu"))
    assert largest_leak(engine.forward, rows) < 1e-5
