"""Runs of models with towers on forked ranks: batches with and without images, frozen parts, rates of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rayswift.config.job import ModelSpec
from rayswift.models.loading import load_model
from rayswift.planning.parts import part_of
from rayswift.training import checkpoint
from tests.multimodal_models import make
from tests.ranks.test_run import figures, order_of, train

NUM_ROWS = 24


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of which every third has an image and one has two: some steps have one on one rank alone."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for i in range(NUM_ROWS):
        row: dict[str, Any] = {"query": f"What is {i}?", "response": f"It is {'so ' * (i % 5)}{i}."}
        if i % 3 == 0:
            pixels = np.random.default_rng(i).integers(0, 255, (40, 56, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            row |= {"query": "<image>" * (1 + (i == 6)) + row["query"], "images": [f"{i}.png"] * (1 + (i == 6))}
        lines.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: make(family, folder / family) for family in ("llava", "qwen2_5_vl")}


CHANGES: dict[str, Any] = {
    "data.eval": [], "data.max_length": 128, "data.packing": False, "train.epochs": 1, "train.eval_every": None,
    "train.save_every": None, "train.lr": 0.02,
}  # fmt: skip


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_rank_without_an_image_waits_for_nobody(
    tmp_path: Path, models: dict[str, Path], rows: Path, family: str
) -> None:
    """Sharded and not, ZeRO 2 and 3: the losses and gradients of one process, whatever images a rank has."""
    one = order_of("one", tmp_path, models[family], rows, ranks=1, **CHANGES)
    ended = train(one)
    assert ended.ledger.rows_trained == NUM_ROWS
    for name, changes in {
        "fsdp": {}, "ddp": {"parallel.dp_replicate": 2, "parallel.dp_shard": 1},
        "zero3": {"parallel.engine": "deepspeed", "parallel.zero_stage": 3},
    }.items():  # fmt: skip
        two = order_of(name, tmp_path, models[family], rows, ranks=2, **CHANGES, **changes)
        assert train(two) == ended
        for key in ("loss", "grad_norm"):
            assert figures(two, key) == pytest.approx(figures(one, key), abs=2e-5), (name, key)


def test_frozen_parts_stay_and_are_not_in_the_checkpoint(tmp_path: Path, models: dict[str, Path], rows: Path) -> None:
    frozen = {"model.freeze": ["vision", "language"], "train.save_every": 2}
    one, two = (
        order_of(name, tmp_path, models["llava"], rows, ranks=ranks, **CHANGES | frozen)
        for name, ranks in (("one", 1), ("two", 2))
    )
    assert train(one) == train(two)
    assert figures(two, "loss") == pytest.approx(figures(one, "loss"), abs=2e-5)
    for order in (one, two):
        weights = checkpoint.load_weights(checkpoint.newest(order.job.run_dir))
        assert {part_of(name) for name in weights} == {"projector"}


def test_a_part_has_the_learning_rate_it_is_given(tmp_path: Path, models: dict[str, Path], rows: Path) -> None:
    """Under SGD a step is the gradient times the rate: a tenth of the rate is a tenth of the step."""
    common = CHANGES | {"train.max_steps": 1, "train.schedule": "constant", "train.max_grad_norm": None}
    steps = {}
    for name, groups in (("same", {}), ("slow", {"vision": 0.002, "projector": 0.04})):
        order = order_of(name, tmp_path, models["llava"], rows, ranks=1, **common, **{"train.lr_groups": groups})
        train(order)
        steps[name] = checkpoint.load_weights(checkpoint.newest(order.job.run_dir))

    start = load_model(ModelSpec(path=str(models["llava"]))).state_dict()
    factors = {"vision": 0.1, "projector": 2.0, "language": 1.0}
    for name, before in start.items():
        moved, slow = (steps[key][name] - before for key in ("same", "slow"))
        np.testing.assert_allclose(slow, moved * factors[part_of(name)], atol=2e-7, err_msg=name)
    assert any(float((steps["same"][n] - start[n]).abs().max()) > 1e-6 for n in start if part_of(n) == "vision")
