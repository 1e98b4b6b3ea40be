"""The checks of a run on itself under every engine and layout, and in whole runs: recorded, and without a trace."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from rayswift.errors import ConfigError
from rayswift.planning.layout import Layout
from rayswift.training.run_dir import RunDir
from rayswift.training.self_check import _first_rows, plain, refuse_leaking_packing, refuse_other_losses
from tests.data_cases import MARKED
from tests.engine_cases import build
from tests.job_cases import make_job
from tests.multimodal_models import make
from tests.ranks.forked import RankFailed, run_ranks
from tests.ranks.test_run import figures, order_of, train

LAYOUTS = {
    "fsdp2": (Layout(dp_shard=2), "fsdp2"),
    "tp": (Layout(tp=2), "fsdp2"),
    "cp": (Layout(cp=2), "fsdp2"),
    "pp": (Layout(pp=2), "pipeline"),
    "pp, dp": (Layout(dp_shard=2, pp=2), "pipeline"),
    "deepspeed": (Layout(dp_shard=2), "deepspeed"),
}
DOCUMENTS = [plain(np.arange(3, 3 + length)) for length in (20, 31, 12, 25, 18)]


def check(rank: int, layout: Layout, engine_name: str, leaks: bool) -> tuple[float, str]:
    """The largest difference of a loss and "", or 0 and why it was refused, as this rank sees it."""
    settings = {f"parallel.{axis}": getattr(layout, axis) for axis in ("dp_shard", "tp", "cp", "pp")}
    job = make_job(**settings)
    engine = build(job, layout, engine=engine_name)
    if leaks:
        forward = engine.forward

        def leaking(batch: Any) -> Any:  # what came before moves everything behind it
            return forward(batch) - 0.001 * batch.input_ids_BT.cumsum(1)

        engine.forward = leaking
    try:
        if not leaks:
            refuse_leaking_packing(engine, job)
        return refuse_other_losses(engine, job, DOCUMENTS), ""
    except ConfigError as error:
        return 0.0, str(error)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_checks_itself_and_finds_a_leak_on_every_rank(name: str) -> None:
    layout, engine = LAYOUTS[name]
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    for difference, refused in run_ranks(check, layout.world_size, layout, engine, False):
        assert not refused
        assert difference <= 1e-6 * 6
    for _, refused in run_ranks(check, layout.world_size, layout, engine, True):
        assert "data.packing=True gives rows other losses than they have alone" in refused


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty conversations."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    turns = [
        [
            *({"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i * 3}"}),
            *({"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So " * (1 + i % 5)}),
        ]
        for i in range(40)
    ]
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    return path


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_rows_with_images_are_packed_with_their_features_and_positions(tmp_path: Path, family: str) -> None:
    lines = []
    for i in range(6):
        row: dict[str, Any] = {"query": f"What is {i}?", "response": f"It is {i}."}
        if i % 2 == 0:
            pixels = np.random.default_rng(i).integers(0, 255, (40, 56, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{i}.png")
            row |= {"query": "<image>" + row["query"], "images": [f"{i}.png"]}
        lines.append(json.dumps(row))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    order = order_of(
        "media", tmp_path, make(family, tmp_path / family), tmp_path / "rows.jsonl", ranks=1,
        **{"data.max_length": 512, "data.eval": [], "train.eval_every": None, "train.max_steps": 1},
    )  # fmt: skip
    found = _first_rows(order)
    assert [len(document.media) for document in found.documents] == [1, 0, 1, 0]
    assert [document.rope_AT is not None for document in found.documents[::2]] == [family == "qwen2_5_vl"] * 2
    assert found.num_prompts == 3, "of the rows without"
    train(order)
    (event,) = (one for one in RunDir(order.job.run_dir).read_jsonl("events.jsonl") if one["event"] == "self_check")
    assert event["num_documents"] == 4
    assert event["difference"] <= 1e-6 * 7


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_checks_leave_no_trace_in_a_run(tmp_path: Path, tiny_model_dir: Path, rows: Path, ranks: int) -> None:
    settings: dict[str, Any] = {
        "train.optimizer": "adamw", "train.max_steps": 4, "adapter": {"rank": 4, "dropout": 0.1}, "data.eval": [],
        "train.eval_every": None,
    }  # fmt: skip
    runs = {}
    for checked in (True, False):
        runs[checked] = order_of(
            f"checked-{checked}", tmp_path, tiny_model_dir, rows, ranks=ranks, **settings,
            **{"train.self_check": checked},
        )  # fmt: skip
        train(runs[checked])
    assert figures(runs[True], "loss") == figures(runs[False], "loss"), "bit for bit"
    assert figures(runs[True], "grad_norm") == figures(runs[False], "grad_norm")
    events = {
        checked: [
            event for event in RunDir(run.job.run_dir).read_jsonl("events.jsonl") if event["event"] == "self_check"
        ]
        for checked, run in runs.items()
    }
    assert events[False] == []
    (event,) = events[True]
    assert event["difference"] <= 1e-6 * 7
    assert (event["num_documents"], event["num_prompts"]) == (4, 12)
    assert event["seconds"] < 30
    hashes = {make_job(**{"train.self_check": checked}).job_hash() for checked in runs}
    assert len(hashes) == 1, "a run may be continued with or without"


def test_a_template_that_trains_what_is_not_served_stops_every_rank(
    tmp_path: Path, tiny_model_dir: Path, rows: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = MARKED
    tokenizer.save_pretrained(model)
    settings: dict[str, Any] = {"data.eval": [], "train.eval_every": None, "train.max_steps": 1}
    with pytest.raises(RankFailed, match=r"model\.path=.* trains another prompt than is served: from token .*; mend"):
        train(order_of("stopped", tmp_path, model, rows, ranks=2, **settings))
    order = order_of("anyway", tmp_path, model, rows, ranks=1, **settings, **{"train.self_check": False})
    assert train(order).step == 1
