"""One rank has the weights, the others shapes only: once the engine is built, each has its part of the same model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from rayswift import plugins
from rayswift.models.adapters import add_lora
from rayswift.planning.layout import Layout, Seat
from tests.engine_cases import take_step, tiny_model
from tests.job_cases import make_job
from tests.ranks.forked import run_ranks


@dataclass(frozen=True)
class Case:
    layout: Layout
    engine: str = "fsdp2"
    arch: str = "qwen3"
    tied: bool = False
    lora: bool = False
    changes: tuple[tuple[str, Any], ...] = ()

    def job(self) -> Any:
        return make_job(**dict(self.changes), **({"adapter": {"rank": 4}} if self.lora else {}))

    def model(self) -> Any:
        model = tiny_model(self.arch, tied=self.tied, layers=4)
        job = self.job()
        return model if job.adapter is None else add_lora(model, job.adapter, seed=0)


CASES = {
    "fsdp2 2 offloaded, tied": Case(Layout(dp_shard=2), tied=True, changes=(("parallel.offload", "parameters"),)),
    "fsdp2 2 x tp 2, tied, lora": Case(Layout(dp_shard=2, tp=2), tied=True, lora=True),
    "ep 2": Case(Layout(dp_shard=2, ep=2), arch="qwen3_moe"),
    "pp 2 zbv x fsdp2 2, tied": Case(
        Layout(pp=2, dp_shard=2), "pipeline", tied=True, changes=(("parallel.schedule", "zbv"),)
    ),
    "pp 2 x tp 2, buffers in files": Case(Layout(pp=2, tp=2), "pipeline", arch="gpt_neox"),
}


def fill(rank: int, case: Case) -> tuple[dict[str, Any], float, int]:
    """The whole weights this rank gives out, a step's loss, and how many values it held before the engine was built."""
    from accelerate import init_empty_weights

    if rank == 0:
        model = case.model()
    else:
        with init_empty_weights(include_buffers=False):
            model = tiny_model(case.arch, tied=case.tied, layers=4)
        model.tie_weights()
        job = case.job()
        model = model if job.adapter is None else add_lora(model, job.adapter, seed=0)
    held = sum(p.numel() for p in model.parameters() if not p.is_meta)
    engine_class = plugins.load("parallel.engines", case.engine)
    engine = engine_class(model, case.job(), Seat(case.layout, rank), torch.device("cpu"))
    weights = {name: tensor.numpy().copy() for name, tensor in engine.export_weights()}
    return weights, take_step(engine, 0).loss, held


def whole(rank: int, case: Case) -> float:
    """The loss of the same step where every rank has the weights."""
    engine_class = plugins.load("parallel.engines", case.engine)
    engine = engine_class(case.model(), case.job(), Seat(case.layout, rank), torch.device("cpu"))
    return take_step(engine, 0).loss


@pytest.mark.parametrize("name", CASES)
def test_ranks_without_weights_get_theirs(name: str) -> None:
    case = CASES[name]
    expected = {name: p.detach().numpy() for name, p in case.model().named_parameters() if p.requires_grad}
    found = run_ranks(fill, case.layout.world_size, case)
    assert all(held == 0 for _, _, held in found[1:])
    given = {name for weights, _, _ in found for name in weights}
    assert expected.keys() <= given
    for weights, loss, _ in found:
        assert loss == found[0][1]
        assert all(np.array_equal(weights[name], expected[name]) for name in weights.keys() & expected.keys())
    assert found[0][1] == run_ranks(whole, case.layout.world_size, case)[0]
