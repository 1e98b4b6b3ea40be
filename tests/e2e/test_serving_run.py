"""`serving.app.run` as a process of its own: it starts a cluster, answers, prints how to ask, and stops when told."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from rayswift.serving.process import ready_text
from rayswift.serving.spec import ServeSpec

pytestmark = pytest.mark.e2e
_PROGRAM = """
import sys
from rayswift.serving.app import run
from rayswift.serving.spec import ServeSpec
run(ServeSpec(models={"tiny": sys.argv[1]}, port=int(sys.argv[2]), engine="local", device="cpu"))
"""


def test_run_serves_until_sigterm(tiny_model_dir: Path, ray_temp_dir: str, tmp_path: Path) -> None:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    printed = tmp_path / "stdout"
    with printed.open("w") as stdout:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(tiny_model_dir), str(port)],
            stdout=stdout, stderr=subprocess.PIPE, text=True, env=os.environ | {"RAYSWIFT_TMPDIR": ray_temp_dir},
        )  # fmt: skip
    try:
        _until(lambda: "print(reply" in printed.read_text() or process.poll() is not None, timeout_s=180)
        assert process.poll() is None, process.communicate()[1]
        body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 2}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            assert json.load(response)["usage"]["completion_tokens"] in (1, 2)
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert printed.read_text() == ready_text(ServeSpec(models={"tiny": "x"}, port=port)) + "\n"
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))  # nothing listens any more


def _until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        threading.Event().wait(0.1)
