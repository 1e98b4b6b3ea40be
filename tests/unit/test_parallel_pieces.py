"""The parts an engine is made of: log-probabilities, the gradient norm, the optimizer's groups, blocks and devices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rayswift import plugins
from rayswift.errors import ConfigError, PlanError
from rayswift.parallel.engine import StepStats
from rayswift.parallel.grads import clip_gradients
from rayswift.parallel.logprobs import token_logprobs
from rayswift.parallel.mesh import collective_backend, find_device
from rayswift.parallel.optim import build_optimizer
from rayswift.parallel.sharding import find_blocks
from tests.engine_cases import tiny_model
from tests.job_cases import make_job


def test_logprobs_are_those_of_a_softmax_written_out() -> None:
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 6, 3], [1, 1, 5]])
    found = token_logprobs(logits, targets)
    assert found.shape == (2, 3)
    for b in range(2):
        for t in range(3):
            scores = logits[b, t].tolist()
            expected = scores[int(targets[b, t])] - math.log(sum(math.exp(score) for score in scores))
            assert float(found[b, t]) == pytest.approx(expected, abs=1e-6)


def test_logprobs_are_float32_for_half_precision_logits() -> None:
    logits = torch.full((1, 1, 4), 60.0, dtype=torch.bfloat16)
    found = token_logprobs(logits, torch.zeros(1, 1, dtype=torch.int64))
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(math.log(0.25))


def _with_gradients(*values: list[float]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(len(value))) for value in values]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = torch.tensor(value)
    return parameters


def test_the_norm_is_global_and_gradients_are_scaled_to_the_maximum() -> None:
    parameters = [*_with_gradients([3.0, 0.0], [4.0]), nn.Parameter(torch.zeros(2))]
    assert clip_gradients(parameters, 1.0) == pytest.approx(5.0)
    assert parameters[0].grad is not None
    assert parameters[0].grad.tolist() == pytest.approx([0.6, 0.0], abs=1e-6)
    assert parameters[2].grad is None


@pytest.mark.parametrize("max_norm", [None, 10.0])
def test_small_gradients_are_left_alone(max_norm: float | None) -> None:
    parameters = _with_gradients([3.0], [4.0])
    assert clip_gradients(parameters, max_norm) == pytest.approx(5.0)
    assert [float(p.grad) for p in parameters if p.grad is not None] == [3.0, 4.0]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_returned_and_scales_nothing(bad: float) -> None:
    parameters = _with_gradients([bad], [4.0])
    assert not math.isfinite(clip_gradients(parameters, 1.0))
    assert parameters[1].grad is not None
    assert float(parameters[1].grad) == 4.0


def test_weight_decay_is_for_matrices_only() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    model[0].weight.requires_grad_(True)
    optimizer = build_optimizer(model, make_job(**{"train.weight_decay": 0.1, "train.betas": [0.8, 0.9]}).train)
    assert isinstance(optimizer, torch.optim.AdamW)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {id(p): 0.1 if p.ndim == 2 else 0.0 for p in model.parameters()}
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_sgd_with_momentum_over_what_is_trained() -> None:
    model = nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    optimizer = build_optimizer(model, make_job(**{"train.optimizer": "sgd", "train.momentum": 0.9}).train)
    assert isinstance(optimizer, torch.optim.SGD)
    assert [p is model.weight for group in optimizer.param_groups for p in group["params"]] == [True]
    assert optimizer.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("arch", ["qwen3", "llama", "gpt2"])
def test_blocks_are_the_decoder_layers(arch: str, lora: bool) -> None:
    blocks = find_blocks(tiny_model(arch, lora=lora))
    assert len(blocks) == 2
    assert len({type(block) for block in blocks}) == 1
    assert not any(
        inner is other for block in blocks for inner in block.modules() for other in blocks if other != block
    )


def test_blocks_of_an_unknown_model_are_its_longest_list() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(2, 2)])
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(3)])

    model = Plain()
    assert find_blocks(model) == list(model.layers)
    assert find_blocks(nn.Linear(2, 2)) == []


def test_cpu_is_always_there() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert collective_backend("cpu") == "gloo"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_a_device_that_is_not_there_is_refused() -> None:
    assert find_device("auto") == torch.device("cpu")
    with pytest.raises(PlanError) as caught:
        find_device("cuda")
    assert str(caught.value) == (
        "cluster.device=cuda is not available here; torch finds no accelerator; use cluster.device=auto or cpu"
    )


def test_loss_of_a_step_is_its_mean_and_zero_for_nothing() -> None:
    assert StepStats(loss_sum=6.0, count=4.0).loss == 1.5
    assert StepStats(loss_sum=0.0, count=0.0).loss == 0.0


@pytest.mark.parametrize("name", plugins.names("parallel.engines"))
def test_an_engine_declares_what_it_supports(name: str) -> None:
    supports = plugins.load("parallel.engines", name).capability.supports
    axes = {"dp_replicate", "dp_shard", "cp", "tp", "pp", "ep"}
    dtypes = {"float32", "bfloat16", "float16", "float8"}
    offload = {"offload_optimizer", "offload_parameters", "offload_nvme"}
    known = axes | dtypes | offload | {"full", "lora", "nf4", "zero_stage"}
    known |= {"tied", "moe", "packing", "recompute", "reference", "rollout", "scalar_head"}
    assert isinstance(supports, frozenset)
    assert supports <= known
    assert supports & {"float32", "bfloat16", "float16"}
    assert supports & {"full", "lora"}


def test_an_unknown_engine_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"parallel.engine=fsdp is not one of .*; did you mean fsdp2\?"):
        plugins.load("parallel.engines", "fsdp", path="parallel.engine")
