"""Architectures that differ from the one the engine suite uses, cut in two: a slice of the support matrix in README.

Fused projections, soft caps and tied embeddings, parallel residuals, latent attention with shared experts, experts,
scaled embeddings; then what keeps an architecture that nobody has measured from being computed wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest

from rayswift.errors import PlanError
from rayswift.parallel.context import ContextPart
from rayswift.parallel.stages import cut
from rayswift.planning.layout import Layout
from tests.architecture_cases import tiny_architecture
from tests.architecture_cells import Column, Outcome, expected, refused, run_cell
from tests.parity import difference
from tests.ranks.forked import run_ranks

ARCHITECTURES = ("phi3", "gemma2", "gpt_neox", "deepseek_v3", "mixtral", "granite")
CUTS = {"tp": Column(Layout(tp=2), packing=True), "pp": Column(Layout(pp=2), "pipeline", packing=True)}
TP_LORA, EP_LORA = Column(Layout(tp=2), lora=True), Column(Layout(dp_shard=2, ep=2), lora=True)
# What the planner refuses, brought past it: an engine says it too, for it knows architectures that no table has.
NETS = {
    ("apertus", "tp"): (Column(Layout(tp=2)), r"only a part of the gradient of model\.layers\.0\.mlp\.act_fn"),
    ("glm4_moe", "tp"): (Column(Layout(tp=2)), r"only a part of the gradient of .*\.q_norm\.weight"),
    ("deepseek_v3", "tp, adapter"): (TP_LORA, "low-rank pair on stacked experts, which parallel.tp cannot cut"),
    ("deepseek_v3", "ep, adapter"): (EP_LORA, "low-rank pair on stacked experts, which parallel.ep cannot cut"),
    ("bloom", "cp"): (Column(Layout(cp=2)), "an attention that cannot be exchanged"),
    ("qwen3_next", "cp"): (Column(Layout(cp=2)), "blocks with linear_attention"),
    ("gemma2", "cp"): (Column(Layout(cp=2)), "an attention with softcap"),
    ("stablelm", "cp"): (Column(Layout(cp=2)), "does not hand down what its attention needs"),
}


def run_all(rank: int, cells: Sequence[tuple[str, Column]]) -> list[Outcome | str]:
    """What each cell gives on this rank."""
    return [run_cell(rank, architecture, column) for architecture, column in cells]


@cache
def outcomes(axis: str) -> list[list[Outcome | str]]:
    """Each rank's outcomes, forked once for all architectures."""
    return run_ranks(run_all, 2, [(name, CUTS[axis]) for name in ARCHITECTURES])


@cache
def nets() -> list[list[Outcome | str]]:
    return run_ranks(run_all, 2, [(name, column) for (name, _), (column, _) in NETS.items()])


@pytest.mark.parametrize("axis", CUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_architecture_cut_in_two_computes_the_run_of_a_bare_loop(architecture: str, axis: str) -> None:
    assert refused(architecture, CUTS[axis]) is None
    ranks: list[Any] = [rank[ARCHITECTURES.index(architecture)] for rank in outcomes(axis)]
    assert isinstance(ranks[0], Outcome), ranks[0]
    found = difference(ranks, expected(architecture, False))
    assert found.is_within, found


@pytest.mark.parametrize("cell", NETS, ids=" ".join)
def test_an_engine_refuses_what_would_be_wrong(cell: tuple[str, str]) -> None:
    column, reason = NETS[cell]
    known = refused(cell[0], column)
    assert known is not None
    assert known.state == "refused"
    first, second = (rank[list(NETS).index(cell)] for rank in nets())
    assert isinstance(first, str), "it was computed"
    assert first == second
    assert re.search(reason, first), first


def test_a_model_that_changes_hidden_states_between_its_modules_is_not_cut() -> None:
    model = tiny_architecture("llama")
    cut(tiny_architecture("llama"), [0], 2, run=lambda *_: _[1])
    forward = model.model.forward

    def scaled(**inputs: Any) -> Any:
        out = forward(**inputs)
        out.last_hidden_state = out.last_hidden_state * 2
        return out

    model.model.forward = scaled
    with pytest.raises(PlanError, match="changes hidden states between its modules"):
        cut(model, [0], 2, run=lambda *_: _[1])


def test_blocks_that_exchanged_nothing_are_noticed() -> None:
    part = ContextPart(mesh=None, position_ids_BT=None, exchanges=3)  # type: ignore[arg-type]
    part.check(3)
    with pytest.raises(PlanError, match="1 blocks without attention"):
        part.check(4)
