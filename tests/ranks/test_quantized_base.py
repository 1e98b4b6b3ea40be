"""QLoRA: an adapter on a base in 4 bits under several layouts, compared with a bare loop over the same packed base."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rayswift import plugins
from rayswift.config.job import Job
from rayswift.models.adapters import add_lora
from rayswift.models.loading import load_model
from rayswift.planning.layout import Layout, Seat
from tests.engine_cases import DOCS_PER_STEP, Reference, documents, take_step, tiny_model
from tests.job_cases import make_job
from tests.ranks.forked import run_ranks

LR = 0.1
LAYOUTS = {
    "one process": (Layout(), "fsdp2"),
    "hsdp 2x2": (Layout(dp_replicate=2, dp_shard=2), "fsdp2"),
    "cp 2": (Layout(cp=2), "fsdp2"),
    "pp 2": (Layout(pp=2), "pipeline"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    return str(folder)


def make(base: str, **changes: Any) -> Job:
    settings: dict[str, Any] = {
        "model.path": base,
        "model.quantization": "nf4",
        "adapter": {"rank": 4},
        "train.optimizer": "sgd",
    }
    settings |= {"train.lr": LR}
    return make_job(**(settings | {"train.max_grad_norm": 0.5} | changes))


def adapted(job: Job) -> Any:
    """The packed base with an adapter of which both halves get gradients."""
    assert job.adapter is not None
    model = add_lora(load_model(job.model, dtype=getattr(torch, job.model.dtype)), job.adapter, seed=0)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def train(rank: int, job: Job, layout: Layout, engine: str) -> list[tuple[float, float | None]]:
    built = plugins.load("parallel.engines", engine)(adapted(job), job, Seat(layout, rank), torch.device("cpu"))
    steps = [take_step(built, number, micro_batches=2, lr=LR) for number in range(4)]
    return [(stats.loss, stats.grad_norm) for stats in steps]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_base_in_four_bits_is_the_same_under_every_layout(base: str, layout: str) -> None:
    chosen, engine = LAYOUTS[layout]
    job = make(base, **{"model.activation_checkpointing": layout == "hsdp 2x2"})
    model = adapted(job)
    packed = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    assert packed, "the base is packed"
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    reference = Reference(model, job)
    expected = [reference.step(documents(DOCS_PER_STEP, seed=number)) for number in range(4)]
    for steps in run_ranks(train, chosen.world_size, job, chosen, engine):
        assert steps == [pytest.approx(step, abs=1e-5) for step in expected]


def test_packed_bytes_are_stored_in_the_dtype_they_are_sharded_in(base: str) -> None:
    """FSDP casts parameters to the compute dtype: of packed bytes that would leave nothing."""
    exact = run_ranks(train, 1, make(base), Layout(), "fsdp2")[0]
    half = run_ranks(train, 2, make(base, **{"model.dtype": "bfloat16"}), Layout(dp_shard=2), "fsdp2")[0]
    assert [loss for loss, _ in half] == pytest.approx([loss for loss, _ in exact], abs=0.05)
