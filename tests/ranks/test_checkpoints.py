"""A checkpoint of one layout under another: the same weights, the same optimizer, the same losses after it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from rayswift.planning.layout import Layout
from rayswift.training import checkpoint
from tests.engine_cases import build, take_step
from tests.job_cases import make_job
from tests.ranks.forked import run_ranks


@dataclass(frozen=True)
class Way:
    """A layout with its engine and settings."""

    layout: Layout
    engine: str = "fsdp2"
    schedule: str = "1f1b"


FSDP2, FSDP4, ONE = Way(Layout(dp_shard=2)), Way(Layout(dp_shard=4)), Way(Layout())
TP_FSDP = Way(Layout(dp_shard=2, tp=2))
PP_TP = Way(Layout(pp=2, tp=2), "pipeline")
ZBV = Way(Layout(pp=2), "pipeline", "zbv")
EP = Way(Layout(dp_shard=2, ep=2))


@dataclass(frozen=True)
class Case:
    """A way there and back again, and what is trained."""

    there: Way
    back: Way
    tied: bool = False
    lora: bool = False
    arch: str = "qwen3"
    dtype: str = "float32"


CASES = {
    "fsdp2 2 <-> 4": Case(FSDP2, FSDP4),
    "fsdp2 2 <-> pp 2 x tp 2, tied": Case(FSDP2, PP_TP, tied=True),
    "one <-> zbv, tied": Case(ONE, ZBV, tied=True),
    "fsdp2 2 <-> tp 2 x fsdp2 2, lora": Case(FSDP2, TP_FSDP, lora=True),
    "fsdp2 4 <-> ep 2, experts": Case(FSDP4, EP, arch="qwen3_moe"),
    "fsdp2 2 <-> one, float16": Case(FSDP2, ONE, dtype="float16"),
}


def make(case: Case, way: Way) -> Any:
    settings = {"train.optimizer": "sgd", "train.momentum": 0.9, "train.max_grad_norm": 0.5, "model.dtype": case.dtype}
    adapter = {"adapter": {"rank": 4}} if case.lora else {}
    job = make_job(**(settings | adapter | {"parallel.schedule": way.schedule}))
    layers = 4 if "zbv" in (case.there.schedule, case.back.schedule) else 2
    return build(job, way.layout, arch=case.arch, tied=case.tied, layers=layers, engine=way.engine)


def train(rank: int, case: Case, way: Way, read: str | None, write: str, steps: range) -> tuple[list[float], Any]:
    """Losses of the steps from the checkpoint `read` on, and the trained weights of this rank after it was read."""
    engine = make(case, way)
    if read is not None:
        state = engine.state()
        checkpoint.load_state(read, state)
        engine.load_state(state)
    loaded = {name: tensor.numpy().copy() for name, tensor in engine.export_weights()}
    losses = [take_step(engine, number, micro_batches=2, lr=0.05).loss for number in steps]
    dcp.save(engine.state(), storage_writer=checkpoint.storage_writer(write))
    dist.barrier()
    return losses, loaded


def go(case: Case, way: Way, read: str | None, write: str, steps: range) -> tuple[list[float], dict[str, Any]]:
    found = run_ranks(train, way.layout.world_size, case, way, read, write, steps)
    weights = {name: tensor for _, part in found for name, tensor in part.items()}
    return found[0][0], weights


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_again(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    places = [str(tmp_path / part) for part in ("whole", "first", "second", "third")]
    whole, _ = go(case, case.there, None, places[0], range(6))
    first, _ = go(case, case.there, None, places[1], range(2))
    second, loaded = go(case, case.back, places[1], places[2], range(2, 4))
    third, returned = go(case, case.there, places[2], places[3], range(4, 6))
    tolerance = 1e-2 if case.dtype == "float16" else 1e-5
    assert first + second + third == pytest.approx(whole, abs=tolerance)
    for place, weights in ((places[1], loaded), (places[2], returned)):
        saved = checkpoint.load_weights(place)
        assert weights.keys() == saved.keys()
        assert all(np.array_equal(weights[key], saved[key].numpy()) for key in saved), "weights travel exactly"


def test_no_rank_writes_the_whole_model(tmp_path: Path) -> None:
    """Each rank of a pipeline x tensor parallel layout writes a share of the bytes."""
    case = Case(PP_TP, PP_TP)
    go(case, PP_TP, None, str(tmp_path / "saved"), range(1))
    sizes = [file.stat().st_size for file in (tmp_path / "saved").glob("__*.distcp")]
    assert len(sizes) == 4
    assert max(sizes) < 0.5 * sum(sizes)
    assert torch.is_tensor(next(iter(checkpoint.load_weights(str(tmp_path / "saved")).values())))
