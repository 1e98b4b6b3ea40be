"""The endpoint under Ray Serve's own commands: `serve deploy` of serve/config.yaml, and `serve run serve.app:app`.

The cluster is a process of its own, started away from the checkout, so that nothing there can be imported that a user's
cluster could not import either.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

pytestmark = [pytest.mark.e2e, pytest.mark.ray]
_KEY = "deploy-test-key-7c21"
_CLUSTER = """
import json, sys, ray
context = ray.init(
    address="local", num_cpus=2, include_dashboard=True, dashboard_host="127.0.0.1", dashboard_port=0,
    _temp_dir=sys.argv[1], log_to_driver=False, object_store_memory=100 * 2**20,
)
print(json.dumps([f"http://{context.dashboard_url}", context.address_info["gcs_address"]]), flush=True)
sys.stdin.read()
ray.shutdown()
"""


@dataclass(frozen=True)
class _Cluster:
    """A private one, and the `serve` command for it."""

    python: str
    dashboard: str
    address: str

    def command(self, *words: str) -> list[str]:
        return [self.python, "-m", "ray.serve.scripts", *words]

    def serve(self, *words: str) -> None:
        """Run `serve ...` away from the checkout, which has to do what it is told."""
        done = subprocess.run(
            self.command(*words), cwd=tempfile.gettempdir(), capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def applications(self) -> Any:
        """What the dashboard says of Serve; None while it does not answer."""
        token = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
        asked = urllib.request.Request(f"{self.dashboard}/api/serve/applications/", headers=token)
        try:
            with urllib.request.urlopen(asked, timeout=30) as answer:
                return json.load(answer)
        except (urllib.error.URLError, TimeoutError):
            return None

    def status(self, name: str) -> str:
        """That of one application. One that cannot be deployed fails the test with its reason."""
        found = (self.applications() or {}).get("applications", {}).get(name, {"status": "absent"})
        assert found["status"] not in ("DEPLOY_FAILED", "UNHEALTHY"), found["message"]
        return str(found["status"])


@pytest.fixture
def cluster(ray_temp_dir: str, tmp_path: Path) -> Iterator[_Cluster]:
    # Ray starts no process from a Python whose path has a space, as that of a checkout may have.
    environment = Path(ray_temp_dir) / "env"
    environment.unlink(missing_ok=True)
    environment.symlink_to(sys.prefix)
    python = str(environment / Path(sys.executable).relative_to(sys.prefix))
    # Serve gives its proxy 3 x 5 s to start, which on a busy machine is too little.
    hook = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "rayswift.serving.proxy.middlewares"}  # as config.yaml says
    variables = os.environ | hook | {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
    with (tmp_path / "cluster.log").open("w+") as log:
        process = subprocess.Popen(
            [python, "-c", _CLUSTER, ray_temp_dir], cwd=ray_temp_dir, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=log, text=True, env=variables,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, (tmp_path / "cluster.log").read_text()
            made = _Cluster(python, *json.loads(line))
            _until(lambda: made.applications() is not None, "the dashboard answers")
            yield made
        finally:
            try:
                process.communicate(timeout=90)  # the end of its input ends it, and Ray with it
            finally:
                process.kill()
                process.wait()


def test_serve_deploy_of_the_config_in_the_checkout(
    cluster: _Cluster, root: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Filled in as its comments say."""
    spec = tmp_path / "serve.yaml"
    spec.write_text(yaml.safe_dump({"models": {"tiny": str(tiny_model_dir)}, "engine": "local", "device": "cpu"}))
    config, port = yaml.safe_load((root / "serve/config.yaml").read_text()), _free_port()
    (application,) = config["applications"]
    filled = {"RAYSWIFT_SERVE": str(spec), "RAYSWIFT_API_KEY": _KEY, "PYTHONPATH": str(root)}
    assert set(application["runtime_env"]["env_vars"]) == set(filled)
    application["runtime_env"]["env_vars"] = filled
    config["http_options"]["port"] = port
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))

    cluster.serve("deploy", str(tmp_path / "config.yaml"), "--address", cluster.dashboard)
    _until(lambda: cluster.status("rayswift") == "RUNNING", "the application runs")
    assert cluster.applications()["proxy_location"] == "HeadOnly"
    _ask(port)
    _ask_too_much(port)
    cluster.serve("shutdown", "--yes", "--address", cluster.dashboard)
    _until(lambda: not _listens(port), "the proxy ends")


@pytest.mark.long
def test_serve_run_of_the_app_in_the_checkout(
    cluster: _Cluster, root: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Beside a Serve whose address was chosen before; Ctrl-C ends both."""
    port = _free_port()
    cluster.serve("start", "--address", cluster.address, "--http-host", "127.0.0.1", "--http-port", str(port))
    # As if there were no environment of vLLM: what is asked for here is the folder alone, which engine `auto` serves.
    variables = {"RAYSWIFT_SERVE": str(tiny_model_dir), "RAYSWIFT_SERVE_PYTHON": "/absent", "RAYSWIFT_API_KEY": _KEY}
    with _running(cluster, variables, root, tmp_path / "log") as process:
        _until(lambda: process.poll() is not None or cluster.status("default") == "RUNNING", "the application runs")
        assert process.poll() is None, (tmp_path / "log").read_text()
        _ask(port)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, (tmp_path / "log").read_text()
    assert not _listens(port)


@contextmanager
def _running(cluster: _Cluster, variables: Mapping[str, str], root: Path, log: Path) -> Iterator[subprocess.Popen[str]]:
    with log.open("w") as out:
        process = subprocess.Popen(
            cluster.command("run", "serve.app:app", "--address", cluster.address), cwd=root, stdout=out,
            stderr=subprocess.STDOUT, text=True, env=os.environ | variables,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _ask(port: int) -> None:
    """What the endpoint says with its key, and without."""
    url = f"http://127.0.0.1:{port}/v1"
    with openai.OpenAI(base_url=url, api_key=_KEY, max_retries=0, timeout=60) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        reply = client.completions.create(model="tiny", prompt="import os", max_tokens=4, temperature=0)
        assert reply.usage is not None
        assert 0 < reply.usage.completion_tokens <= 4
    stranger = openai.OpenAI(base_url=url, api_key="another-key-0", max_retries=0, timeout=60)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.completions.create(model="tiny", prompt="x", max_tokens=1)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{url}/models", timeout=60)


def _ask_too_much(port: int) -> None:
    """Bounds hold as under `rayswift serve`, and no client sets Serve's own timeout."""
    url, asked = f"http://127.0.0.1:{port}/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 1}
    headers = {"authorization": f"Bearer {_KEY}", "x-request-timeout-seconds": "0.0001"}
    with httpx.Client(headers=headers, timeout=60, trust_env=False) as client:
        for body, status, code in (
            ({"prompt": "x" * 3 * 2**20}, 413, "request_too_large"),
            ({"n": 10**6}, 400, None),
            ({"no_such_field": 1}, 400, None),
            ({}, 200, None),
        ):
            reply = client.post(url, json=asked | body)
            assert reply.status_code == status, reply.text
            assert code is None or reply.json()["error"]["code"] == code


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _until(condition: Callable[[], Any], what: str, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        threading.Event().wait(0.2)
