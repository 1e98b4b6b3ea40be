"""What lies in a run directory decides whether a job may go on, start afresh, or is refused before anything starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from rayswift import api
from rayswift.cluster.preflight import prepare
from rayswift.config.job import Job
from rayswift.data.ledger import Ledger
from rayswift.errors import CheckpointError, ConfigError, PlanError
from rayswift.training.checkpoint import CheckpointManifest
from tests.hub_cases import HubDataset, commit_name, point_at, serve_hub


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    return folder


def begin(run_dir: Path, plain: dict[str, Any], *, steps: int) -> None:
    """A run that has taken so many steps and no checkpoint."""
    (run_dir / "job.yaml").write_text(Job.model_validate(plain).model_dump_json())
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps({"step": n}) + "\n" for n in range(steps + 1)))


def commit(run_dir: Path, plain: dict[str, Any], *, finished: bool = False) -> None:
    """A valid checkpoint of step 7, with no file in it."""
    prepared = prepare(Job.model_validate(plain))
    manifest = CheckpointManifest(
        step=7, finished=finished, job_hash=prepared.job.job_hash(), job=prepared.job.model_dump(mode="json"),
        layout={}, engine="fsdp2", ledger=asdict(Ledger.start(prepared.train_stream.fingerprint)), seed=0,
        versions={}, files={},
    )  # fmt: skip
    folder = run_dir / "checkpoints" / "step-00000007"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(manifest.model_dump_json())


@pytest.mark.parametrize("committed", [True, False])
def test_a_run_of_another_job_is_refused_with_the_difference(
    run_dir: Path, plain: dict[str, Any], committed: bool
) -> None:
    if committed:
        commit(run_dir, plain)  # job.yaml may be gone: the checkpoint itself tells whose it is
    else:
        begin(run_dir, plain, steps=3)
    before = sorted(path.name for path in run_dir.rglob("*"))
    plain["train"] = {"lr": 0.5}
    with pytest.raises(ConfigError, match=r"runs/run is a run of a different job \(train\.lr: 0\.0001 -> 0\.5\)"):
        api.run(Job.model_validate(plain))
    assert sorted(path.name for path in run_dir.rglob("*")) == before


BEFORE, AFTER = commit_name(1), commit_name(2)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: dict[str, Any]) -> Iterator[HubDataset]:
    """A dataset on a hub that the job trains on."""
    files = {"train.jsonl": Path(plain["data"]["train"][0]["path"]).read_bytes()}
    moved = {"train.jsonl": files["train.jsonl"].replace(b'"q1', b'"Q1')}
    dataset = HubDataset({BEFORE: files, AFTER: moved}, {"main": BEFORE, "v1": BEFORE})
    plain["data"]["train"] = [{"path": "hf::org/rows#12"}]
    with serve_hub({"org/rows": dataset}) as stand_in:
        point_at(monkeypatch, stand_in.url, tmp_path)
        yield dataset


def test_a_run_keeps_the_commit_of_a_hub_it_began_with(run_dir: Path, plain: dict[str, Any], hub: HubDataset) -> None:
    fresh = prepare(Job.model_validate(plain))
    assert fresh.job.data.train[0].path == f"hf::org/rows@~{BEFORE}#12"
    assert fresh.train_stream.num_rows_total == 12
    commit(run_dir, plain)
    hub.branches["main"] = AFTER
    again = prepare(Job.model_validate(plain))
    assert again.checkpoint is not None
    assert again.job.data.train[0].path == fresh.job.data.train[0].path
    assert again.train_stream.fingerprint == fresh.train_stream.fingerprint
    plain["name"] = "another"
    other = prepare(Job.model_validate(plain))
    assert other.job.data.train[0].path == f"hf::org/rows@~{AFTER}#12"
    assert other.train_stream.fingerprint != fresh.train_stream.fingerprint


def test_another_revision_of_a_hub_is_another_job(run_dir: Path, plain: dict[str, Any], hub: HubDataset) -> None:
    commit(run_dir, plain)
    plain["data"]["train"] = [{"path": "hf::org/rows@v1#12"}]
    with pytest.raises(ConfigError, match=r'data\.train\.0\.path: "hf::org/rows#12" -> "hf::org/rows@v1#12"'):
        prepare(Job.model_validate(plain))


def test_a_run_of_a_hub_without_a_checkpoint_is_the_same_job(
    run_dir: Path, plain: dict[str, Any], hub: HubDataset
) -> None:
    begin(run_dir, plain, steps=3)
    assert prepare(Job.model_validate(plain)).checkpoint is None


def test_a_job_that_failed_before_its_first_step_may_be_corrected(run_dir: Path, plain: dict[str, Any]) -> None:
    begin(run_dir, plain, steps=0)
    plain["train"] = {"lr": 0.5}
    assert prepare(Job.model_validate(plain)).checkpoint is None


def test_a_job_yaml_that_cannot_be_read_is_told(run_dir: Path, plain: dict[str, Any]) -> None:
    begin(run_dir, plain, steps=3)
    (run_dir / "job.yaml").write_text("name: [")
    with pytest.raises(ConfigError, match=r"job\.yaml cannot be read"):
        prepare(Job.model_validate(plain))


def test_what_does_not_change_losses_may_change_between_sessions(
    tmp_path: Path, run_dir: Path, plain: dict[str, Any]
) -> None:
    commit(run_dir, plain)
    moved = tmp_path / "elsewhere" / "rows.jsonl"
    moved.parent.mkdir()
    shutil.copy(tmp_path / "rows.jsonl", moved)
    plain["data"]["train"][0]["path"] = str(moved)
    plain["train"] = {"max_steps": 7, "save_every": 3}
    plain["cluster"] = {"workers": 2}
    found = prepare(Job.model_validate(plain)).checkpoint
    assert found is not None
    assert found.step == 7


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_whose_rows_have_changed_is_refused(
    tmp_path: Path, run_dir: Path, plain: dict[str, Any], finished: bool
) -> None:
    commit(run_dir, plain, finished=finished)
    assert prepare(Job.model_validate(plain)).finished == finished
    (tmp_path / "rows.jsonl").write_text('{"query": "another", "response": "row"}\n')
    with pytest.raises(CheckpointError, match=r"step-00000007.* was made with other rows"):
        prepare(Job.model_validate(plain))


@pytest.mark.parametrize("committed", [True, False])
def test_an_existing_run_is_refused_when_asked_to(run_dir: Path, plain: dict[str, Any], committed: bool) -> None:
    if committed:
        commit(run_dir, plain)
    else:
        begin(run_dir, plain, steps=0)
    plain["train"] = {"resume": "never"}
    with pytest.raises(ConfigError, match="exists already; give the job another name"):
        prepare(Job.model_validate(plain))


def test_a_run_continues_from_a_directory_where_its_base_is_elsewhere(
    tmp_path: Path, run_dir: Path, plain: dict[str, Any], tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # from where models/tiny could be a hub id
    begin(run_dir, {**plain, "model": {"path": f"models/{tiny_model_dir.name}"}}, steps=3)
    assert prepare(Job.model_validate(plain)).checkpoint is None


def test_a_full_disk_is_found_before_anything_starts(
    tmp_path: Path, plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(PlanError, match=r"output=.*runs has 1000 B free, but 2 checkpoints"):
        prepare(Job.model_validate(plain))


def test_the_room_of_its_own_checkpoints_is_not_missing_to_a_run(
    tmp_path: Path, run_dir: Path, plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(run_dir, plain)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with (run_dir / "checkpoints" / "step-00000007" / "shards").open("wb") as sparse:
        sparse.truncate(1 << 30)
    assert prepare(Job.model_validate(plain)).checkpoint is not None


def test_the_setting_that_differs_is_named_within_a_source(run_dir: Path, plain: dict[str, Any]) -> None:
    commit(run_dir, plain)
    plain["data"]["train"][0]["limit"] = 5
    with pytest.raises(ConfigError, match=r"different job \(data\.train\.0\.limit: null -> 5\)"):
        prepare(Job.model_validate(plain))
