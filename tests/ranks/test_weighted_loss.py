"""The loss is the sum of weight times loss over the sum of the weights, of all sequences, micro-batches and ranks.

Compared with a bare loop over the documents, one by one, with weights as `loss_scale` or `data.loss_weights` give them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rayswift.planning.layout import Layout
from tests.engine_cases import METHOD, Document, build, documents, share, tiny_model
from tests.job_cases import make_job
from tests.ranks.forked import run_ranks

LAYOUTS = {
    "one": (Layout(), "fsdp2"),
    "dp": (Layout(dp_shard=2), "fsdp2"),
    "cp": (Layout(cp=2), "fsdp2"),
    "pp": (Layout(pp=2), "pipeline"),
}
WAYS = [(packing, micro_batches) for packing in (True, False) for micro_batches in (1, 3)]


def weighted(seed: int = 3) -> list[Document]:
    """Documents of tokens that count 0, 0.5, 1, 2 or 3; one of them counts nothing at all."""
    random = np.random.default_rng(seed)
    weights = np.array([0, 0.5, 1, 2, 3], np.float32)
    rows = [Document(row.ids, random.choice(weights, len(row.ids))) for row in documents(11, seed=seed)]
    rows[4] = Document(rows[4].ids, np.zeros_like(rows[4].mask))
    return rows


def settings_of(layout: Layout) -> dict[str, Any]:
    axes = {f"parallel.{axis}": getattr(layout, axis) for axis in ("dp_shard", "cp", "pp")}
    return axes | {"train.optimizer": "sgd", "train.max_grad_norm": None}


def losses(rank: int, name: str) -> list[tuple[float, float, float]]:
    """(loss, count, gradient norm) of the same rows in each way, on this rank."""
    layout, engine_name = LAYOUTS[name]
    engine = build(make_job(**settings_of(layout)), layout, engine=engine_name)
    found = []
    for packing, micro_batches in WAYS:
        batches = share(
            weighted(), packing=packing, micro_batches=micro_batches,
            data_rank=engine.data_rank, data_size=engine.data_size,
        )  # fmt: skip
        count = engine.sum_over_data([sum(float(METHOD.count(batch)) for batch in batches)])[0]
        stats = engine.optimizer_step(engine.forward_backward(batches, METHOD, count), 0.0)
        assert stats.grad_norm is not None
        found.append((stats.loss, stats.count, stats.grad_norm))
    return found


@cache
def expected() -> tuple[float, float, float]:
    """The same from a bare loop. A document's first token is predicted by nothing, whatever it counts."""
    model = tiny_model().train()
    total, count = torch.zeros(()), 0.0
    for row in weighted():
        ids = torch.from_numpy(row.ids)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        of_tokens = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
        total = total + (of_tokens * torch.from_numpy(row.mask[1:])).sum()
        count += float(row.mask[1:].sum())
    loss = total / count
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return float(loss.detach()), count, float(torch.cat([grad.flatten() for grad in grads]).norm())


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_count_is_the_sum_of_the_weights_however_the_rows_are_split(name: str) -> None:
    loss, count, norm = expected()
    for rank in run_ranks(losses, LAYOUTS[name][0].world_size, name):
        for found in rank:
            assert found[0] == pytest.approx(loss, abs=1e-5)
            assert found[1] == count
            assert found[2] == pytest.approx(norm, rel=1e-4)


def test_the_weights_matter() -> None:
    """What is compared with is not the plain mean of the trained tokens."""
    total, count = 0.0, 0
    model = tiny_model().eval()
    for row in weighted():
        ids = torch.from_numpy(row.ids)
        kept = torch.from_numpy(row.mask[1:] > 0)
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
        total += float(F.cross_entropy(logits[:-1][kept], ids[1:][kept], reduction="sum"))
        count += int(kept.sum())
    assert abs(total / count - expected()[0]) > 1e-3
