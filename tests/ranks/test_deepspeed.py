"""DeepSpeed's ZeRO on forked ranks: the run of a bare torch loop, and checkpoints that fsdp2 reads and writes."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
import torch.distributed as dist

from rayswift.cluster.preflight import prepare
from rayswift.config.job import Job
from rayswift.parallel import deepspeed_ops
from rayswift.parallel.engines.deepspeed import Deepspeed
from rayswift.parallel.engines.fsdp2 import Fsdp2
from rayswift.planning.layout import Layout, Seat
from rayswift.planning.planner import plan
from rayswift.training import checkpoint
from rayswift.training.order import WorkOrder
from rayswift.training.run import local_open, run_rank
from rayswift.training.run_dir import RunDir
from rayswift.training.state import TrainState
from tests.engine_cases import DOCS_PER_STEP, METHOD, Reference, documents, take_step, tiny_model
from tests.engine_cases import build as build_engine
from tests.job_cases import CPU_BOX, make_job
from tests.ranks.forked import run_ranks

STEPS, LR = 4, 0.1
# Parameters below the threshold stay whole on every rank, which in a tiny model would be all of them.
ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 40}
HOST = {"device": "cpu"}


@dataclass(frozen=True)
class Case:
    """A section `zero_optimization`, what is trained, and in how many pieces a step is computed."""

    zero: dict[str, Any]
    packing: bool = True
    micro_batches: int = 1
    lora: bool = False
    tied: bool = False
    arch: str = "qwen3"
    changes: dict[str, Any] = field(default_factory=dict)

    def job(self, folder: Path, **more: Any) -> Job:
        """Its job, with the section in a file."""
        text = json.dumps({"zero_optimization": self.zero, "gradient_clipping": "auto"})
        path = folder / f"{os.getpid()}-{crc32(text.encode())}.json"  # no rank reads what another one writes
        path.write_text(text)
        settings: dict[str, Any] = {
            "train.optimizer": "sgd", "train.lr": LR, "train.max_grad_norm": 0.5, "parallel.deepspeed": str(path),
        }  # fmt: skip
        adapter = {"adapter": {"rank": 4}} if self.lora else {}
        return make_job(**(settings | adapter | self.changes | more))


CASES = {
    "zero1, unpacked, accumulated": Case({"stage": 1}, packing=False, micro_batches=3),
    "zero2, accumulated": Case({"stage": 2}, micro_batches=2),
    "zero3": Case(ZERO3),
    "zero3, unpacked, accumulated": Case(ZERO3, packing=False, micro_batches=3),
    "zero3, tied, recomputed, no clipping": Case(
        ZERO3, tied=True, changes={"model.activation_checkpointing": True, "train.max_grad_norm": None}
    ),
    "zero2, optimizer on the host": Case({"stage": 2, "offload_optimizer": HOST}, micro_batches=2),
    "zero3, optimizer and parameters on the host": Case(
        {**ZERO3, "offload_optimizer": HOST, "offload_param": HOST}, micro_batches=2
    ),
    "zero2, lora": Case({"stage": 2}, lora=True),
    "zero3, mixture of experts": Case(ZERO3, arch="qwen3_moe", micro_batches=2),
    "zero3, lora, accumulated": Case(ZERO3, lora=True, micro_batches=2),
}


@dataclass(frozen=True)
class Outcome:
    """(loss, gradient norm) of each step, and the trained weights after the last."""

    steps: list[tuple[float, float]]
    weights: dict[str, Any]


def build(job: Job, ranks: int, *, tied: bool = False, arch: str = "qwen3") -> Deepspeed:
    """This rank's engine around the tiny model."""
    engine: Deepspeed = build_engine(job, Layout(dp_shard=ranks), tied=tied, arch=arch, engine="deepspeed")
    return engine


def run_cases(rank: int, folder: Path, cases: dict[str, Case]) -> dict[str, Outcome]:
    """Every case on this rank, one after the other."""
    found = {}
    for name, case in cases.items():
        engine = build(case.job(folder), dist.get_world_size(), tied=case.tied, arch=case.arch)
        steps = []
        for number in range(STEPS):
            stats = take_step(engine, number, packing=case.packing, micro_batches=case.micro_batches)
            steps.append((stats.loss, stats.grad_norm))
        found[name] = Outcome(steps, {name: tensor.numpy() for name, tensor in engine.export_weights()})
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    """Each rank's outcomes of all cases, forked once."""
    return run_ranks(run_cases, 2, tmp_path_factory.mktemp("ds"), CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_stage_computes_the_run_of_a_bare_loop(outcomes: Any, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    reference = Reference(tiny_model(case.arch, lora=case.lora, tied=case.tied), case.job(tmp_path))
    wanted = [reference.step(documents(DOCS_PER_STEP, seed=number)) for number in range(STEPS)]
    for outcome in (rank[name] for rank in outcomes):
        for (loss, norm), (wanted_loss, wanted_norm) in zip(outcome.steps, wanted, strict=True):
            assert loss == pytest.approx(wanted_loss, abs=1e-5)
            assert norm == pytest.approx(wanted_norm, abs=1e-5, rel=1e-5)
        assert reference.weights().keys() <= outcome.weights.keys()
        for key, tensor in reference.weights().items():
            assert outcome.weights[key] == pytest.approx(tensor.numpy(), abs=1e-5), key


def build_wide(job: Job, ranks: int) -> Deepspeed:
    """An engine whose matrices are large enough for NVMe: DeepSpeed leaves pieces below 1 MiB where they are."""
    model = tiny_model()
    torch.manual_seed(1)
    model.resize_token_embeddings(16384, mean_resizing=False)
    return Deepspeed(model, job, Seat(Layout(dp_shard=ranks), dist.get_rank()), torch.device("cpu"))


def train_on_nvme(rank: int, folder: Path) -> dict[str, Any]:
    """Two AdamW steps in memory and on NVMe, and a third after a checkpoint was taken over by a fresh engine."""
    common = {"train.max_grad_norm": 0.5, "train.weight_decay": 0.1, "parallel.deepspeed": None}
    moved = common | {"parallel.offload": "parameters", "parallel.nvme": str(folder), "name": "mine"}
    engines = [build_wide(make_job(**settings), 2) for settings in (common, moved)]
    steps = [[take_step(engine, number, micro_batches=2) for number in range(2)] for engine in engines]
    states = [engine.state() for engine in engines]
    fresh = build_wide(make_job(**moved | {"name": "fresh"}), 2)
    fresh.load_state(states[1])
    engines.append(fresh)
    last = [take_step(engine, 3) for engine in engines]
    memory, nvme = ({**state["model"], **state["optim"]} for state in states)
    assert memory.keys() == nvme.keys()
    off = max(float((memory[key] - nvme[key]).abs().max()) for key in memory if torch.is_tensor(memory[key]))
    files = {path.parts[-1].rpartition(".")[2] for path in (folder / "mine").rglob("*") if path.is_file()}
    return {
        "losses": [[stats.loss for stats in found] for found in steps], "off": off, "files": files,
        "last": [(stats.loss, stats.grad_norm) for stats in last],
    }  # fmt: skip


@pytest.mark.skipif(bool(deepspeed_ops.missing()), reason="DeepSpeed's async_io is not built; make deepspeed-ops")
def test_nvme_trains_as_memory_does(tmp_path: Path) -> None:
    for found in run_ranks(train_on_nvme, 2, tmp_path):
        assert found["files"] == {"swp"}
        assert found["losses"][1] == pytest.approx(found["losses"][0], abs=1e-5)
        assert found["off"] < 1e-4, "AdamW magnifies rounding"
        assert found["last"][1] == pytest.approx(found["last"][0], abs=1e-5)
        assert found["last"][2] == found["last"][1]


def save(engine: Any, url: str) -> None:
    """As the Saver does it: in the background, over a gloo group."""
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

    async_save(
        engine.state(), storage_writer=checkpoint.storage_writer(url), process_group=dist.new_group(backend="gloo"),
        async_checkpointer_type=AsyncCheckpointerType.THREAD,
    ).result()  # fmt: skip


def loaded(engine: Any, url: str) -> Any:
    """The engine, continued as a run is."""
    state = engine.state()
    checkpoint.load_state(url, state)
    engine.load_state(state)
    return engine


def weights_of(engine: Any) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in engine.export_weights()}


def keys_of(engine: Any) -> set[str]:
    """What all ranks hold together."""
    mine = [f"{part}.{key}" for part, found in engine.state().items() for key in found]
    held: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(held, mine)
    return {key for keys in held for key in keys}


def pass_a_checkpoint_on(folder: Path, changes: dict[str, Any], tied: bool) -> dict[str, Any]:
    """ZeRO-3 -> fsdp2 -> ZeRO-2, each continued for a step beside the one it continues. Three ranks cut unevenly."""
    folder.mkdir(exist_ok=True)
    ranks = dist.get_world_size()
    jobs = [Case(zero).job(folder, **ADAMW, **changes) for zero in (ZERO3, {"stage": 2})]
    first = build(jobs[0], ranks, tied=tied)
    for number in range(2):
        take_step(first, number, micro_batches=2)
    save(first, str(folder / "first"))
    second = loaded(build_engine(jobs[0], Layout(dp_shard=ranks), tied=tied), str(folder / "first"))
    found = {"keys": [keys_of(first), keys_of(second)], "weights": [weights_of(first), weights_of(second)]}
    found["losses"] = [[take_step(engine, number).loss for number in (2, 3)] for engine in (first, second)]
    save(second, str(folder / "second"))
    third = loaded(build(jobs[1], ranks, tied=tied), str(folder / "second"))
    found["weights again"] = [weights_of(second), weights_of(third)]
    found["losses again"] = [[take_step(engine, number).loss for number in (4, 5)] for engine in (second, third)]
    return found


ADAMW = {"train.optimizer": "adamw", "train.weight_decay": 0.1}


def pass_checkpoints_on(rank: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Of each kind of model what `pass_a_checkpoint_on` found."""
    kinds: dict[str, tuple[dict[str, Any], bool]] = {
        "full": ({}, False), "tied": ({}, True), "lora": ({"adapter": {"rank": 4}}, False),
    }  # fmt: skip
    return {kind: pass_a_checkpoint_on(folder / kind, *settings) for kind, settings in kinds.items()}


def test_a_checkpoint_goes_on_under_another_engine(tmp_path: Path) -> None:
    ranks = run_ranks(pass_checkpoints_on, 3, tmp_path)
    for kind, found in (item for rank in ranks for item in rank.items()):
        assert found["keys"][0] == found["keys"][1]
        for before, after in (found["weights"], found["weights again"]):
            assert before.keys() == after.keys()
            assert all(np.array_equal(before[name], after[name]) for name in before)
        assert found["losses"][1] == pytest.approx(found["losses"][0], abs=1e-5)
        assert found["losses again"][1] == pytest.approx(found["losses again"][0], abs=1e-5)
        exported = checkpoint.load_weights(str(tmp_path / kind / "first"))
        assert all(np.array_equal(tensor.numpy(), found["weights"][0][name]) for name, tensor in exported.items())


class Overflowing:
    """SFT, but one rank's loss is infinite."""

    def __init__(self, broken: bool) -> None:
        self._factor = float("inf") if broken else 1.0

    def loss(self, logprobs: torch.Tensor, batch: Any) -> torch.Tensor:
        return METHOD.loss(logprobs, batch) * self._factor


def skip_a_step(rank: int, folder: Path) -> dict[str, list[bool]]:
    """Of each case: was the step skipped, is its norm not finite, were weights kept, is the next step taken."""
    found = {}
    for name, zero in SKIPPING.items():
        dtype = name.partition(" ")[0]
        engine = build(Case(zero).job(folder, **{"model.dtype": dtype}), 2)
        before = weights_of(engine)
        stats = take_step(engine, 0, micro_batches=2, method=Overflowing(rank == 1))
        kept = all(np.array_equal(tensor, before[name]) for name, tensor in weights_of(engine).items())
        found[name] = [stats.skipped, not math.isfinite(stats.grad_norm), kept, not take_step(engine, 1).skipped]
    return found


SKIPPING: dict[str, dict[str, Any]] = {
    "float32 zero1": {"stage": 1},
    "float32 zero2": {"stage": 2},
    "float32 zero3": ZERO3,
    "float32 zero2 offloaded": {"stage": 2, "offload_optimizer": HOST},
    "float32 zero3 offloaded": {**ZERO3, "offload_optimizer": HOST},
    "bfloat16 zero1": {"stage": 1},
    "bfloat16 zero2": {"stage": 2},
    "float16 zero3": ZERO3,
}


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(tmp_path: Path) -> None:
    for found in run_ranks(skip_a_step, 2, tmp_path):
        assert found == {name: [True] * 4 for name in SKIPPING}


def train_in_16_bits(rank: int, folder: Path) -> dict[str, tuple[bool, list[float]]]:
    """Of each case: does it start from the exact float32 weights and fsdp2's scale, and the losses."""
    found = {}
    for name, (dtype, zero, lora) in IN_16_BITS.items():
        engine = build(Case(zero, lora=lora).job(folder, **{"model.dtype": dtype}), 2)
        model = tiny_model(lora=lora, dtype=getattr(torch, dtype) if lora else torch.float32)
        exact = {key: parameter.detach().float().numpy() for key, parameter in model.named_parameters()}
        same = all(np.array_equal(tensor, exact[key]) for key, tensor in weights_of(engine).items())
        scale = float(engine.state()["scale"]["value"]) if dtype == "float16" else 2.0**16
        found[name] = same and scale == 2.0**16, [take_step(engine, n, micro_batches=2).loss for n in range(STEPS)]
    return found


OFFLOADED = {**ZERO3, "offload_optimizer": HOST, "offload_param": HOST}
IN_16_BITS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "bfloat16 zero1": ("bfloat16", {"stage": 1}, False),
    "bfloat16 zero2": ("bfloat16", {"stage": 2}, False),
    "bfloat16 zero3": ("bfloat16", ZERO3, False),
    "bfloat16 zero3 offloaded lora": ("bfloat16", OFFLOADED, True),
    "float16 zero2 lora": ("float16", {"stage": 2}, True),
    "float16 zero3": ("float16", ZERO3, False),
}


def test_16_bits_stay_near_float32_and_start_from_its_weights(outcomes: Any, tmp_path: Path) -> None:
    one, two = run_ranks(train_in_16_bits, 2, tmp_path)
    assert one == two
    for name, (same, losses) in one.items():
        exact = [loss for loss, _ in outcomes[0]["zero2, lora" if "lora" in name else "zero3"].steps]
        assert same, name
        assert losses == pytest.approx(exact, abs=0.03), name
        assert losses != pytest.approx(exact, abs=1e-5), "it is computed in another precision"


def order_of(folder: Path, model: Path, name: str, steps: int, ranks: int, **changes: Any) -> WorkOrder:
    """The work order of a small AdamW run."""
    rows = folder / "rows.jsonl"
    lines = ({"query": f"What is {i}?", "response": f"{i} " * (1 + i % 6)} for i in range(40))
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings: dict[str, Any] = {
        "name": name, "output": str(folder), "model.path": str(model), "data.train": [{"path": str(rows)}],
        "data.eval": [{"path": str(rows), "limit": 9}], "data.max_length": 64, "train.global_batch_size": 4,
        "train.micro_batch_size": 1, "train.lr": 1e-3, "train.schedule": "constant", "train.save_every": 2,
        "train.max_steps": steps, "train.epochs": 9, "cluster.workers": ranks, "cluster.device": "cpu",
    }  # fmt: skip
    prepared = prepare(make_job(**(settings | changes)))
    engines = {"fsdp2": Fsdp2.capability, "deepspeed": Deepspeed.capability}
    made = plan(prepared.job, prepared.shape, CPU_BOX, engines=engines)
    return WorkOrder(prepared.job, made, prepared.train_stream, prepared.eval_stream)


def train_rank(rank: int, order: WorkOrder) -> TrainState:
    return run_rank(order, Seat(order.plan.layout, rank), rank, local_open)


def figures(order: WorkOrder, key: str) -> list[float]:
    return [record[key] for record in RunDir(order.job.run_dir).read_jsonl("metrics.jsonl") if key in record]


def test_a_run_goes_on_under_another_engine(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Whole runs: ZeRO-3 on two ranks, continued by fsdp2 on one, and that by ZeRO-2 with its optimizer moved out."""
    whole = order_of(tmp_path, tiny_model_dir, "whole", 8, 1)
    ended = run_ranks(train_rank, 1, whole)[0]
    for steps, ranks, changes in (
        (3, 2, {"parallel.zero_stage": 3}),
        (5, 1, {}),
        (8, 2, {"parallel.engine": "deepspeed", "parallel.deepspeed": "zero2_offload"}),
    ):
        part = order_of(tmp_path, tiny_model_dir, "parts", steps, ranks, **changes)
        assert part.plan.engine == ("deepspeed" if changes else "fsdp2")
        last = set(run_ranks(train_rank, ranks, part))
    assert last == {ended}
    assert figures(part, "loss") == pytest.approx(figures(whole, "loss"), abs=2e-5)
    assert figures(part, "eval_loss")[-1] == pytest.approx(figures(whole, "eval_loss")[-1], abs=2e-5)
