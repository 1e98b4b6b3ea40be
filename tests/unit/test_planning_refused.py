"""What is known to go wrong with an architecture is refused from its config, and README says what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.architectures import BEGIN, END, KEPT, README, render
from rayswift.errors import PlanError
from rayswift.planning.refused import REFUSED, Refusal, check_refused
from tests.architecture_cases import ARCHITECTURES
from tests.job_cases import make_job

COLUMNS = {"tp": ("TP 2", "TP 2, LoRA"), "ep": ("EP 2", "EP 2, LoRA"), "cp": ("CP 2",), "packing": ("packed",),
           "adapter": ("EP 2, LoRA",)}  # fmt: skip
LORA = {"adapter": {"rank": 4}}


def cells() -> dict[str, dict[str, dict[str, Any]]]:
    return dict(json.loads(KEPT.read_text())["architectures"])


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({"model_type": "apertus"}, {"parallel.tp": 2}, r"parallel\.tp=2 has no way to cut apertus: .*; use "
         r"parallel\.tp=1; dp_shard shards its parameters too"),
        ({"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text"}}, {"parallel.cp": 2},
         r"parallel\.cp=2 has no way to cut qwen3_5_text: some of its blocks are no attention"),
        ({"model_type": "gpt_oss"}, {"data.packing": True}, r"data\.packing=True has no way to pack rows of gpt_oss: "
         r"its attention does not look at position ids; use data\.packing=false"),
        ({"model_type": "deepseek_v3"}, {"parallel.ep": 2, "adapter": {"targets": ["o_proj", "mlp.up_proj"]}},
         r"on stacked experts.*; name the attention's layers in adapter\.targets, or use parallel\.ep=1"),
        ({"model_type": "llama4_text"}, LORA, r"adapter\.targets=all-linear has no way to adapt llama4_text"),
        ({"model_type": "llama4_text", "attention_chunk_size": 16}, {"data.packing": True}, "the middle of documents"),
        ({"model_type": "cohere", "use_qk_norm": True}, {"parallel.tp": 2, **LORA}, "does not cut its head norms"),
        ({"model_type": "gemma2", "attn_logit_softcapping": 50.0}, {"parallel.cp": 2}, "caps scores"),
    ],
)  # fmt: skip
def test_a_known_architecture_is_refused_with_the_setting_and_what_works(
    config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        check_refused(make_job(**{"data.packing": False, **changes}), config)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ({"model_type": "apertus"}, {"parallel.tp": 2, **LORA}),
        ({"model_type": "apertus"}, {"parallel.pp": 2, "parallel.cp": 2}),
        ({"model_type": "glm4_moe", "use_qk_norm": False}, {"parallel.tp": 2}),
        ({"model_type": "cohere"}, {"parallel.tp": 2}),
        ({"model_type": "deepseek_v3"}, {"parallel.tp": 2, "adapter": {"targets": ["o_proj"]}}),
        ({"model_type": "deepseek_v3"}, LORA),
        ({"model_type": "llama4_text", "attention_chunk_size": 8192}, {"data.packing": True}),
        ({"model_type": "gpt_oss"}, {"data.packing": False, "parallel.ep": 2}),
        ({"model_type": "llama"}, {"parallel.tp": 2, "parallel.cp": 2, "parallel.pp": 2}),
        ({}, {}),
    ],
)
def test_what_works_is_let_through(config: dict[str, Any], changes: dict[str, Any]) -> None:
    check_refused(make_job(**changes), config)


@pytest.mark.parametrize("refusal", REFUSED, ids=lambda refusal: f"{refusal.axis} {refusal.model_types[0]}")
def test_every_entry_was_measured(refusal: Refusal) -> None:
    for name in refusal.model_types:
        found = [cells()[name][column] for column in COLUMNS[refusal.axis]]
        assert any(cell["state"] == "refused" and cell["by"] == "planner" for cell in found), name


def test_no_measured_cell_is_wrong_and_the_planner_knows_all_that_are_refused() -> None:
    assert cells().keys() == ARCHITECTURES.keys()
    for name, row in cells().items():
        for column, cell in row.items():
            assert cell["state"] in ("right", "refused", "none"), (name, column)
            assert cell["state"] != "refused" or cell["by"] == "planner", (name, column)
        assert row["1 process"]["state"] == row["FSDP2 2"]["state"] == "right", name


def test_the_readme_has_the_table_of_the_kept_result() -> None:
    text = Path(README).read_text()
    assert text.split(BEGIN)[1].split(END)[0].strip() == render(cells())
