"""What a run proves of itself: it goes through for what is right, and each of its checks can fail, with the fix."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayswift.data.loss_rule import LossRule
from rayswift.data.types import Message, PackedBatch, Sample
from rayswift.errors import ConfigError
from rayswift.parallel.engines.fsdp2 import Fsdp2
from rayswift.planning.layout import Layout, Seat
from rayswift.training.self_check import _first_rows, _read, compare_prompts, plain, refuse_other_losses
from tests.data_cases import CHATML, MARKED, make_tokenizer, write_jsonl
from tests.engine_cases import tiny_model
from tests.job_cases import make_job
from tests.ranks.test_run import order_of
from tests.template_cases import FAMILIES, tokenizer_of

ROWS = Sample((Message("user", "hi"), Message("assistant", "yo"), Message("user", "more"), Message("assistant", "no")))
DOCUMENTS = [plain(np.arange(3, 3 + length)) for length in (20, 31, 12, 25, 18)]


def engine_of(**settings: Any) -> Fsdp2:
    return Fsdp2(tiny_model("qwen3"), make_job(**settings), Seat(Layout()), torch.device("cpu"))


def called_otherwise(engine: Fsdp2, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Patch the model, so that it is called otherwise than it should be."""
    forward = engine._model.forward
    engine._model.forward = lambda **given: forward(**change(given))


@pytest.mark.parametrize("micro_batch_size", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_have_the_losses_packed_that_they_have_alone(dtype: str, micro_batch_size: int) -> None:
    settings = {"model.dtype": dtype, "train.micro_batch_size": micro_batch_size}
    engine, job = engine_of(**settings), make_job(**settings)
    before = torch.random.get_rng_state()
    found = refuse_other_losses(engine, job, DOCUMENTS)
    assert found <= {"float32": 1e-6, "bfloat16": 2e-3}[dtype]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert refuse_other_losses(engine, job, []) <= 2e-3, "made-up documents where no row is usable"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "leak",
    [
        lambda given: given | {"position_ids": None},
        lambda given: given | {"attention_mask": torch.ones_like(given["input_ids"])},
    ],
    ids=["no positions", "mask of ones"],
)
def test_a_model_that_is_made_to_leak_stops_the_run(leak: Any, dtype: str) -> None:
    settings = {"model.dtype": dtype}
    engine, job = engine_of(**settings), make_job(**settings)
    called_otherwise(engine, leak)
    with pytest.raises(ConfigError, match=r"data\.packing=True gives rows other losses .*; set data\.packing=false"):
        refuse_other_losses(engine, job, DOCUMENTS)


class Rounding:
    """An engine of which every shape computes a little otherwise; with `leak`, so does what stands before."""

    def __init__(self, leak: float) -> None:
        self._leak = leak

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        noise = 1e-3 * batch.input_ids_BT.shape[1] / 100
        return -torch.ones(batch.input_ids_BT.shape) - noise - self._leak * (batch.position_ids_BT == 0).cumsum(1)

    def sum_over_data(self, values: list[float]) -> list[float]:
        return values


def test_a_model_that_rounds_more_is_measured_by_its_own_rounding() -> None:
    job = make_job(**{"model.dtype": "float32"})
    assert refuse_other_losses(Rounding(0.0), job, DOCUMENTS) > 1e-4  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="other losses"):
        refuse_other_losses(Rounding(0.02), job, DOCUMENTS)  # type: ignore[arg-type]


@pytest.mark.parametrize("turns", ["default", "last_round", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_templates_of_known_families_pass(name: str, turns: Any) -> None:
    assert compare_prompts(ROWS, tokenizer_of(name), LossRule(turns)) == (2 if turns == "default" else 1)


# Says something else where an answer is to follow, and marks its answers, so that they can be found all the same.
PROMPTED = (
    "{% if add_generation_prompt %}{{ 'Be brief. ' }}{% endif %}{% for m in messages %}{{ m['role'] + ': ' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [MARKED, PROMPTED])
def test_a_template_that_trains_another_prompt_than_is_served_is_found(template: str) -> None:
    found = compare_prompts(ROWS, make_tokenizer(template, eos="</s>"), LossRule())
    assert isinstance(found, str)
    assert re.fullmatch(r"from token \d+ on it is .* in training and .* in serving", found)


def test_rows_that_are_not_trained_on_are_no_fault() -> None:
    tokenizer = make_tokenizer(CHATML)
    assert compare_prompts(Sample(text="a text"), tokenizer, LossRule()) == 0
    refused = replace(ROWS, tools=({"type": "function", "function": {"name": "f"}},))
    assert compare_prompts(refused, tokenizer, LossRule()) == 0


def test_the_first_usable_rows_are_read_and_what_cannot_be_read_is_told(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"query": f"q {i}", "response": "word " * 99} for i in range(9)]
    file = write_jsonl(tmp_path / "a.jsonl", ["not json", {"query": "q", "response": ""}, *rows])
    order = order_of(
        "a", tmp_path, tiny_model_dir, file, ranks=1, **{"data.max_bad_fraction": 1, "data.max_length": 99}
    )
    found = _first_rows(order)
    assert (len(found.documents), found.num_prompts, found.fault) == (4, 6, "")
    assert {len(document.input_ids) for document in found.documents} == {64}
    file.unlink()
    assert "was removed after it was indexed" in str(_read(order))
    monkeypatch.setattr("rayswift.models.loading.load_tokenizer", lambda path: 1 / 0)
    assert str(_read(order)).startswith("the first rows cannot be read (ZeroDivisionError: division by zero); repair")
