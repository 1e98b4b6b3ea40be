"""One GPU: FSDP2 in bfloat16, FP8 and a base in 4 bits stay near the same steps in float32 on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rayswift.models.adapters import add_lora
from rayswift.models.loading import load_model
from rayswift.parallel.engines.fsdp2 import Fsdp2
from rayswift.planning.layout import Layout, Seat
from tests.engine_cases import take_step, tiny_model
from tests.job_cases import make_job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine"),
]


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A process group of one rank, as Ray Train would make it."""
    store = tmp_path_factory.mktemp("store") / "store"
    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=store.as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def losses(model: Any, device: str, **changes: Any) -> list[float]:
    job = make_job(**({"train.optimizer": "sgd", "train.lr": 0.1} | changes))
    engine = Fsdp2(model, job, Seat(Layout()), torch.device(device, 0) if device == "cuda" else torch.device(device))
    return [take_step(engine, number, micro_batches=2, lr=0.1).loss for number in range(4)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gpu_computes_the_losses_of_a_cpu(dtype: str) -> None:
    exact = losses(tiny_model(), "cpu")
    tolerance = 1e-4 if dtype == "float32" else 0.03
    assert losses(tiny_model(), "cuda", **{"model.dtype": dtype}) == pytest.approx(exact, abs=tolerance)


def test_fp8_stays_near_bfloat16() -> None:
    pytest.importorskip("torchao", reason="pip install 'rayswift[fp8]'")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")
    half = losses(tiny_model(), "cuda", **{"model.dtype": "bfloat16"})
    assert losses(tiny_model(), "cuda", **{"model.dtype": "float8"}) == pytest.approx(half, abs=0.05)


def test_a_base_in_four_bits_trains(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    changes = {"model.path": str(tmp_path), "model.quantization": "nf4", "adapter": {"rank": 4}}
    job = make_job(**changes, **{"model.dtype": "bfloat16"})
    assert job.adapter is not None
    found = {}
    for device in ("cpu", "cuda"):
        model = add_lora(load_model(job.model, dtype=torch.bfloat16), job.adapter, seed=0)
        found[device] = losses(model, device, **changes, **{"model.dtype": "bfloat16"})
    assert found["cuda"] == pytest.approx(found["cpu"], abs=0.05)
