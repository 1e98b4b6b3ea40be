"""A job sent to a cluster's dashboard: Ray's own client with jobs/sft.py, and `rayswift submit`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.ray]

Rayswift = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def dashboard(ray_temp_dir: str) -> Iterator[str]:
    """The dashboard URL of a private two-CPU cluster whose nodes find this environment's python first."""
    import ray

    path = os.environ["PATH"]
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"
    try:
        context = ray.init(
            address="local", num_cpus=2, include_dashboard=True, dashboard_host="127.0.0.1", dashboard_port=0,
            _temp_dir=ray_temp_dir, log_to_driver=False,
        )  # fmt: skip
        url = f"http://{context.dashboard_url}"
        wait_for_an_agent(url)
        yield url
    finally:
        ray.shutdown()
        os.environ["PATH"] = path


def wait_for_an_agent(url: str, timeout_s: float = 90) -> None:
    """Ray accepts jobs only some seconds after its dashboard answers."""
    from rayswift.cluster.session import worker_python
    from rayswift.cluster.submit import _connect, _send

    deadline = time.monotonic() + timeout_s
    client = _connect(url)
    submission = _send(client, entrypoint="true", runtime_env=worker_python())
    while client.get_job_status(submission) != "SUCCEEDED":
        assert time.monotonic() < deadline, client.get_job_info(submission)
        time.sleep(0.2)


def settings(model: Path, output: Path) -> list[str]:
    return [f"model.path={model}", f"output={output}", "train.max_steps=3", "cluster.address=auto"]


def test_ray_job_submit_runs_a_job_script(dashboard: str, root: Path, example_model: Path, tmp_path: Path) -> None:
    from rayswift.cluster.session import worker_python

    done = subprocess.run(
        [
            sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", dashboard, "--working-dir", ".",
            "--runtime-env-json", json.dumps(worker_python()),
            "--", "python", "jobs/sft.py", "examples/sft.yaml", *settings(example_model, tmp_path),
        ],
        cwd=root, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "sft-demo" / "report.json").read_text())
    assert report["steps"] == 3
    assert len((tmp_path / "sft-demo" / "metrics.jsonl").read_text().splitlines()) >= 3


def own_copy(root: Path, folder: Path) -> str:
    """A checkout like no other. Ray names a package after its content, and deletes it when the last job with it ends:
    a job sent in that moment with the same content is not uploaded again and finds nothing. (ray 2.60)
    """
    for name in ("rayswift", "examples"):
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "unique").write_text(str(folder))
    return str(folder)


@pytest.mark.long
def test_rayswift_submit_passes_the_exit_code_on(
    dashboard: str, root: Path, rayswift: Rayswift, example_model: Path, tmp_path: Path
) -> None:
    made = [*settings(example_model, tmp_path), "--address", dashboard]
    sent = ["--working-dir", own_copy(root, tmp_path / "first"), "--json"]
    done = rayswift("submit", "examples/sft.yaml", *made, *sent, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told.pop("submission") in done.stderr
    assert told == {"status": "SUCCEEDED", "exit_code": 0}
    assert (tmp_path / "sft-demo" / "report.json").is_file()
    sent = ["--working-dir", own_copy(root, tmp_path / "second")]
    failed = rayswift("submit", "examples/sft.yaml", *made, *sent, "data.train.0.path=absent.jsonl")
    assert failed.returncode == 2
    assert "absent.jsonl" in failed.stdout
