"""The version of a folder, and what clients are told of where its model comes from."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from rayswift.export.manifest import MANIFEST
from rayswift.serving.admission import Admission
from rayswift.serving.engine import FakeEngine
from rayswift.serving.http import build_asgi
from rayswift.serving.lineage import lineage_of
from rayswift.serving.served import ServedModel
from rayswift.serving.spec import ServeSpec
from rayswift.serving.versions import version_of
from tests.page_cases import export_of

_DIFFERENCE = {"max_abs": 0.1, "mean_abs": 0.01, "bound_max_abs": None, "bound_mean_abs": 0.1}
_HELD_OUT = {"rows": {"files": {"/secret/rows.jsonl": "a" * 64}, "num_rows": 1, "num_tokens": 2, "sha256": "a" * 64},
             "reference_loss": 1.0, "loss": 1.01, "perplexity_ratio": 1.0123, "bound_perplexity_ratio": 1.1,
             "top1_agreement": 0.97, "bound_top1_agreement": 0.9}  # fmt: skip
_VERIFY = {"num_prompts": 1, "num_positions": 2, "logprobs": _DIFFERENCE, "top1_agreement": 1.0,
           "tokenizer_equal": True, "chat_template_equal": True, "held_out": _HELD_OUT}  # fmt: skip
_LINEAGE = {"checkpoint": "/secret/runs/demo/checkpoints/step-00000050", "ledger": {}, "ledger_sha256": "d" * 64,
            "job": {"name": "demo", "output": "/secret/runs"}, "data": {"/secret/rows.jsonl": "a" * 64},
            "layout": {}}  # fmt: skip


def test_the_version_is_that_of_the_manifest(tmp_path: Path) -> None:
    one, other = export_of(tmp_path / "one"), export_of(tmp_path / "other", checkpoint_step=51)
    assert version_of(one) == hashlib.sha256((one / MANIFEST).read_bytes()).hexdigest()[:12]
    assert version_of(one) != version_of(other)
    assert version_of(export_of(tmp_path / "again")) == version_of(one)
    assert version_of(tmp_path) is version_of(tmp_path / "absent") is version_of(one / MANIFEST) is None


def test_an_export_is_told_of_without_a_path(tmp_path: Path) -> None:
    folder = export_of(tmp_path / "one", quantizer="gptq", verify=_VERIFY, lineage=_LINEAGE)
    told = lineage_of(folder)
    assert told == {
        "version": version_of(folder), "run": "demo", "base": "base-8b", "base_sha256": "b" * 64, "method": "sft",
        "checkpoint_step": 50, "run_finished": True, "job_hash": "c" * 64, "quantizer": "gptq", "dtype": "bfloat16",
        "perplexity_ratio": 1.0123, "verified": True,
    }  # fmt: skip
    assert "/" not in str(told)


@pytest.mark.parametrize(("base", "shown"), [
    ("Qwen/Qwen3-8B@main", "Qwen3-8B@main"), ("models/base/", "base"), ("../base", "base"), ("base", "base"),
    ("C:\\models\\base", "base"),
])  # fmt: skip
def test_of_a_base_there_is_the_last_name(tmp_path: Path, base: str, shown: str) -> None:
    told = lineage_of(export_of(tmp_path / "one", base=base))
    assert told is not None
    assert (told["base"], told["run"], told["perplexity_ratio"], told["verified"]) == (shown, None, None, False)


def test_a_folder_that_is_no_export_or_of_another_version_of_rayswift(tmp_path: Path) -> None:
    assert lineage_of(tmp_path) is None
    (tmp_path / MANIFEST).write_text('{"from": "the future"}')
    assert lineage_of(tmp_path) == {"version": version_of(tmp_path)}


def test_it_stands_in_the_list_of_models_and_in_each(tmp_path: Path) -> None:
    folder = export_of(tmp_path / "one")
    served: Any = ServedModel(FakeEngine(), None, Admission(1, 1))  # type: ignore[arg-type]  # no prompt is made
    spec = ServeSpec(models={"one": str(folder), "plain": str(tmp_path)})
    app = build_asgi(spec, {"one": replace(served, lineage=lineage_of(folder)), "plain": served})

    async def ask(path: str) -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return (await client.get(path)).json()

    listed = asyncio.run(ask("/v1/models"))["data"]
    assert {card["id"]: card["rayswift"] for card in listed} == {"one": lineage_of(folder), "plain": None}
    assert asyncio.run(ask("/v1/models/one"))["rayswift"] == lineage_of(folder)
