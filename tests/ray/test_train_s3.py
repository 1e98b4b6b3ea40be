"""A run whose rows, checkpoints and reports all lie in an object store, on a server that speaks S3."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayswift import api
from rayswift.cluster.session import session
from rayswift.config.job import Job
from rayswift.training import checkpoint
from tests.s3_cases import s3_bucket

pytestmark = [pytest.mark.ray, pytest.mark.long]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A private store, which Ray's processes find through the environment."""
    yield from s3_bucket(monkeypatch)


def test_a_run_lives_in_an_object_store(
    bucket: Any, tiny_model_dir: Path, ray_temp_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "".join(json.dumps({"query": f"q{i}", "response": f"answer {i}"}) + "\n" for i in range(60))
    bucket.pipe_file("bucket/data/rows.jsonl", rows.encode())
    plain: dict[str, Any] = {
        "name": "far",
        "output": "s3://bucket/runs",
        "model": {"path": str(tiny_model_dir)},
        "data": {"train": [{"path": "s3://bucket/data/*.jsonl"}], "max_length": 64},
        "train": {"max_steps": 3, "global_batch_size": 2, "micro_batch_size": 1, "save_every": 2, "epochs": 5},
        "cluster": {"workers": 2},
    }
    monkeypatch.setenv("RAYSWIFT_TMPDIR", ray_temp_dir)
    with session():
        first = api.run(Job.model_validate(plain))
        plain["train"]["max_steps"] = 5
        second = api.run(Job.model_validate(plain))
    assert (first.steps, second.steps, second.resumed_from_step) == (3, 5, 3)
    assert second.restarts_survived == 0, "an extended run has not failed"
    assert checkpoint.check("s3://bucket/runs/far/checkpoints/step-00000005").step == 5
    steps = [json.loads(line)["step"] for line in bucket.cat("bucket/runs/far/metrics.jsonl").decode().splitlines()]
    assert steps == [1, 2, 3, 4, 5]
    assert bucket.cat("bucket/runs/far/curves.png").startswith(b"\x89PNG")
    assert bucket.ls("bucket/runs/far/checkpoints") == [
        "bucket/runs/far/checkpoints/step-00000004",
        "bucket/runs/far/checkpoints/step-00000005",
    ]
