"""`rayswift serve` behind HAProxy with fronts: an engine that dies ends its streams with an error event there too."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from rayswift.api import export
from rayswift.serving.versions import version_of
from tests.promotion_cases import serving, until, write_spec

pytestmark = [pytest.mark.ray, pytest.mark.long]
_STREAM = {"model": "m", "prompt": "x", "max_tokens": 400, "temperature": 0, "stream": True}


def _engine_of(version: str) -> int:
    """The process that holds a version's engine."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())
            if "ServeReplica" in title and version in title:
                return process.pid
    raise AssertionError(f"no process runs {version}")


def test_an_engine_that_is_killed_costs_its_streams_with_an_error_event_and_the_endpoint_heals(
    tiny_model_dir: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, *counts = free_port(), free_port(), free_port()
    variables = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(counts[0]), "RAY_SERVE_HAPROXY_METRICS_PORT": str(counts[1]),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with tempfile.TemporaryDirectory(prefix="hapf-", dir="/tmp") as name:  # short: HAProxy's socket lies below
        place = Path(name)
        monkeypatch.setenv("RAYSWIFT_TMPDIR", name)
        (place / "exports").mkdir()
        export(str(tiny_model_dir), str(place / "exports/one"))
        url = f"http://127.0.0.1:{port}/v1/completions"
        with serving(place, write_spec(place, {"m": place / "exports/one"}, port)):
            with httpx.stream("POST", url, json=_STREAM, timeout=60, trust_env=False) as response:
                assert response.status_code == 200
                lines = response.iter_lines()
                events = [next(lines) for _ in range(6)]
                os.kill(_engine_of(str(version_of(place / "exports/one"))), signal.SIGKILL)
                events += list(lines)
            said = [json.loads(one.removeprefix("data: ")) for one in events if one.startswith("data: {")]
            assert "choices" in said[0]
            assert said[-1]["error"]["type"] == "server_error"
            assert "could not finish" in said[-1]["error"]["message"]
            short = _STREAM | {"stream": False, "max_tokens": 2}
            until(lambda: _is_answered(url, short), "a new replica answers", 120)


def _is_answered(url: str, body: dict[str, object]) -> bool:
    """Meanwhile it is told that there is none, and when to come again."""
    response = httpx.post(url, json=body, timeout=60, trust_env=False)
    assert response.status_code in (200, 503), response.text
    return response.status_code == 200
