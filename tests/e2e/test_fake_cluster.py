"""cluster.yaml brought to life on this machine: Ray's autoscaler, whose nodes are processes, runs a job of jobs/sft.py.

What is real: the head without CPUs, the pools with their labels, the request of the comments that brings up a node, the
token, the job through Ray's client, and scaling down. What is not: machines, containers, GPUs. `ray.cluster_utils.
AutoscalingCluster` is not used: it calls `ray stop --force`, which would end every Ray on this machine.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.long]

SHAPE = "rayswift.io/node-shape"
HEAD_TYPE = "ray.head.default"  # the name that Ray's fake provider gives its head
# Ray's fake nodes share one session folder, and one that unpacks a job's package wipes it away under the others: give
# each a folder of its own. Named as an external module also because the wheel lacks the defaults that the provider type
# `fake_multinode` reads. (ray 2.60)
PROVIDER = """
import functools, os
from unittest import mock
from ray._private import parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

class Provider(FakeMultiNodeProvider):
    def _create_node_with_resources_and_labels(self, *args):
        own = functools.partial(parameter.RayParams, temp_dir=f"{os.environ['RAY_TMPDIR']}/{self._next_node_id + 1}")
        with mock.patch.object(parameter, "RayParams", own):
            super()._create_node_with_resources_and_labels(*args)
"""
MARK = "RAYSWIFT_TEST_CLUSTER"  # every process of the cluster inherits it, so that all of them are found at the end


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 90) -> Any:
    """The first true value of the condition."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.2)
    return found


def runs(process: psutil.Process) -> bool:
    """Whether it has not ended; one that only waits for its parent to notice has."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def scaled(config: dict[str, Any], address: str) -> dict[str, Any]:
    """The file's own pools with two CPUs a node, on Ray's fake provider; idle nodes go after some seconds."""
    kept = {"cluster_name", "max_workers", "upscaling_speed"}
    pools = copy.deepcopy(config["available_node_types"])
    for pool in pools.values():
        pool["resources"]["CPU"] = min(2, pool["resources"]["CPU"])
        pool["node_config"] = {}
        for key in ("docker", "worker_setup_commands"):
            pool.pop(key, None)
    pools[HEAD_TYPE] = pools.pop(config["head_node_type"])
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        **{key: value for key, value in config.items() if key in kept},
        "idle_timeout_minutes": 0.05,
        "provider": {
            "type": "external", "module": "fake_provider.Provider", "gcs_address": address,
            "launch_multiple": True, "disable_node_updaters": True,
        },
        "available_node_types": pools, "head_node_type": HEAD_TYPE,
        "auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": [], "rsync_exclude": [],
        **{f"{kind}_commands": [] for kind in commands},
    }  # fmt: skip


class FakeCluster:
    """A head started with `ray start`, its processes told apart from all others by an environment variable."""

    def __init__(self, config: dict[str, Any], folder: Path) -> None:
        from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

        self.folder, self.mark = folder, secrets.token_hex(16)
        # Ray starts no process from a Python whose path has a space, as that of a checkout may have.
        (folder / "env").symlink_to(sys.prefix)
        self.python = str(folder / "env" / Path(sys.executable).relative_to(sys.prefix))
        self.seen: set[psutil.Process] = set()
        port, dashboard = free_port(), free_port()
        self.url, self.address = f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}"
        token = folder / "auth_token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        (folder / "fake_provider.py").write_text(PROVIDER)
        (folder / "cluster.json").write_text(json.dumps(scaled(config, self.address)))
        self.client = {
            **{name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"},
            "PATH": f"{Path(self.python).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_API_SERVER_ADDRESS": self.url,
        }  # fmt: skip
        self.token = token.read_text()
        head = config["available_node_types"][config["head_node_type"]]
        environment = {
            **{name: value for name, value in self.client.items() if name != "RAY_API_SERVER_ADDRESS"},
            MARK: self.mark,
            "PYTHONPATH": str(folder), "RAY_TMPDIR": str(folder), "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "AUTOSCALER_METRIC_PORT": str(free_port()), "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        }  # fmt: skip
        stop, line, *self.commands_after_start = config["head_start_ray_commands"]
        assert stop == "ray stop"  # not run: it would end every Ray of this machine
        _, _, *words = shlex.split(line)  # RAY_AUTH_MODE=token ray start ...
        replaced = {
            "--port": port, "--object-spilling-directory": folder / "spill",
            "--autoscaling-config": folder / "cluster.json",
        }  # fmt: skip
        words = [f"{key}={replaced[key]}" if (key := word.split("=")[0]) in replaced else word for word in words]
        words += [
            f"--dashboard-port={dashboard}", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}", "--block",
            f"--ray-client-server-port={free_port()}", "--dashboard-agent-listen-port=0", "--metrics-export-port=0",
            "--object-store-memory=200000000", "--disable-usage-stats",
            # The launcher gives labels by a variable; here the fake nodes would inherit it.
            "--labels=" + ",".join(f"{key}={value}" for key, value in head["labels"].items()),
        ]  # fmt: skip
        with (folder / "head.log").open("w") as log:
            self.head = subprocess.Popen(
                [self.python, "-m", "ray.scripts.scripts", *words],
                stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )  # fmt: skip

    def finish_start(self) -> None:
        """What the file lets the head do after `ray start`."""
        for line in self.commands_after_start:
            environment = {**self.client, "RAY_ADDRESS": self.address, MARK: self.mark}
            done = subprocess.run(
                ["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=60, check=False
            )
            assert done.returncode == 0, done.stderr

    def get(self, path: str, token: str | None = None) -> Any:
        """What the dashboard answers, None while it does not."""
        request = urllib.request.Request(self.url + path)
        if token != "":
            request.add_header("Authorization", f"Bearer {token or self.token}")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError:
            raise
        except OSError:
            assert self.head.poll() is None, (self.folder / "head.log").read_text()
            return None

    def table(self, name: str) -> list[dict[str, Any]]:
        """All rows of one of Ray's state tables."""
        answer = self.get(f"/api/v0/{name}?detail=1&limit=1000&timeout=10")
        return answer["data"]["result"]["result"] if answer else []

    def nodes(self, *, gone: bool = False) -> dict[str, str]:
        """The node shape of every living node, by node id; also of those that lived when asked for."""
        return {row["node_id"]: row["labels"][SHAPE] for row in self.table("nodes") if gone or row["state"] == "ALIVE"}

    def workers(self, *, gone: bool = False) -> dict[str, str]:
        """The same without the head."""
        return {node: shape for node, shape in self.nodes(gone=gone).items() if shape != "head"}

    def submit(self, *words: str, cwd: Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.python, "-m", "ray.scripts.scripts", "job", "submit", *words],
            cwd=cwd, env=self.client, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        """Every process of this cluster that still runs: the marked ones, and what they started."""
        for process in psutil.process_iter():
            try:
                # A process that renames itself may write over the mark: it counts by its parent.
                if process.environ().get(MARK) == self.mark:
                    self.seen |= {process, *process.children(recursive=True)}
            except psutil.Error:
                continue  # ended meanwhile, or somebody else's
        return [process for process in self.seen if runs(process)]

    def stop(self) -> None:
        """End the cluster's processes and no other. Again until there is none: the monitor may just start a node."""

        def kill() -> bool:
            left = self.processes()
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            return not left

        wait_for(kill, "the end of the cluster's processes", 30)
        self.head.wait(timeout=30)


@pytest.fixture
def cluster(root: Path) -> Iterator[FakeCluster]:
    folder = Path(tempfile.mkdtemp(prefix="rayswift-fake-", dir="/tmp"))  # short: Unix sockets live in it
    fake = FakeCluster(yaml.safe_load((root / "cluster.yaml").read_text()), folder)
    try:
        yield fake
    finally:
        fake.stop()
        shutil.rmtree(folder, ignore_errors=True)


def request_of_the_comments(root: Path, bundles: str, shape: str) -> list[str]:
    """The words after `ray job submit` in cluster.yaml's comment, asking for other nodes."""
    text = re.sub(r"\\\n# *", "", (root / "cluster.yaml").read_text())
    (line,) = re.findall(r"^#   ray job submit (.*bundle_label_selectors.*)$", text, re.MULTILINE)
    line = re.sub(r"bundles=\[.*?\] \* \d+", f"bundles={bundles}", line)
    line = re.sub(r"\{'rayswift.io/node-shape': '[^']*'\}\] \* \d+", f"{{'{SHAPE}': '{shape}'}}]", line)
    return shlex.split(line)


def test_a_job_runs_on_the_pool_that_was_asked_for_which_then_goes_away(
    cluster: FakeCluster, root: Path, example_model: Path, tmp_path: Path
) -> None:
    wait_for(lambda: cluster.get("/api/version"), "the dashboard")
    (head,) = wait_for(cluster.nodes, "the head node")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        cluster.get("/api/version", token="")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        cluster.get("/api/version", token="0" * 64)
    assert not cluster.workers(), "a pool keeps nodes by itself"
    cluster.finish_start()

    asked = cluster.submit(*request_of_the_comments(root, "[{'CPU': 2}]", "data"), cwd=tmp_path)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    wait_for(cluster.workers, "a node of the data pool")

    trained = cluster.submit(
        "--working-dir", ".", "--", "python", "jobs/sft.py", "examples/sft.yaml", f"model.path={example_model}",
        f"output={tmp_path}", "train.max_steps=3", cwd=root,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert json.loads((tmp_path / "sft-demo" / "report.json").read_text())["steps"] == 3
    workers = cluster.workers(gone=True)
    assert set(workers.values()) == {"data"}
    actors = {row["actor_id"]: row for row in cluster.table("actors")}
    placed = [row for row in actors.values() if "Worker" in row["class_name"] and row["node_id"]]
    assert placed, [row["class_name"] for row in actors.values()]
    assert {row["node_id"] for row in placed} <= set(workers)
    assert all(row["node_id"] != head for row in cluster.table("tasks") if row["type"] == "NORMAL_TASK")

    wait_for(lambda: not cluster.workers(), "the end of an idle node")  # the request has ended with the job

    assert len(cluster.processes()) > 5  # gcs, raylet, monitor, dashboard, agents: the way they are found works
    cluster.stop()
    assert not cluster.processes()
    with socket.socket() as dashboard:
        assert dashboard.connect_ex(("127.0.0.1", int(cluster.url.rpartition(":")[2]))) != 0
