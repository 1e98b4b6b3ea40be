"""Promotion on real Ray Serve under load: shifted step by step, back by itself when it must, and no request lost.

The endpoint and each promotion are processes of their own, as a user runs them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from rayswift.serving import registry
from rayswift.serving.versions import VERSION_HEADER
from tests.promotion_cases import Endpoint, Load, run, serving, start, until, write_exports, write_spec

pytestmark = [pytest.mark.ray, pytest.mark.long]
_QUICK = ("--steps", "0.3,1", "--step-seconds", "2", "--min-requests", "5", "--max-latency-ratio", "20")


_ENGINE = '''"""The local engine, which hangs while there is a file EXPORT.hangs."""

import asyncio
from pathlib import Path

from rayswift.serving.engines.local import Local


class Sleepy(Local):
    def __init__(self, folder, options):
        super().__init__(folder, options)
        self._sleeps = Path(f"{folder}.hangs")

    async def generate(self, request):
        if self._sleeps.exists():
            await asyncio.Event().wait()
        deltas = super().generate(request)
        try:
            async for delta in deltas:
                yield delta
        finally:
            await deltas.aclose()
'''


_KILL = """
import sys
import ray
from rayswift.cluster.session import session
with session(sys.argv[1], token=sys.argv[2] == "True"):
    named = [one for one in ray.util.list_named_actors(all_namespaces=True)
             if one["name"].startswith("SERVE_REPLICA::rayswift")]
    killed = [ray.get_actor(one["name"], namespace=one["namespace"]) for one in named]
    board = ray.get_actor("rayswift-board", namespace="rayswift")
    for replica in killed:
        ray.kill(replica)
    ray.kill(board, no_restart=False)
    print("killed", *sorted(one["name"].split("#")[0] for one in named))
"""


def _plugin(folder: Path) -> Path:
    """A folder on whose path the engine `sleepy` is installed."""
    (folder / "sleepy_engine.py").write_text(_ENGINE)
    (about := folder / "sleepy_engine-1.dist-info").mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: sleepy-engine\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[rayswift.serving.engines]\nsleepy = sleepy_engine\n")
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """Two versions that answer alike, and one whose weights are noise."""
    return write_exports(tiny_model_dir, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def endpoint(
    exports: Path, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[Endpoint]:
    folder, port = tmp_path_factory.mktemp("endpoint"), free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(_plugin(tmp_path_factory.mktemp("plugin"))), prepend=os.pathsep)
        with serving(folder, write_spec(folder, {"m": exports / "one"}, port, "sleepy")):
            yield Endpoint(f"http://127.0.0.1:{port}/v1", exports)
    assert registry.read_endpoint(exports) is None


@contextmanager
def _promoting(endpoint: Endpoint, name: str, log: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A promotion that has begun to share the traffic, and has ended afterwards, however the test did."""
    with log.open("w") as out:
        running = start("serve", "promote", str(endpoint.exports / name), *options, out=out)
        try:
            until(lambda: endpoint.served().get(endpoint.version(name), 0) > 0 or running.poll() is not None, "shared")
            assert running.poll() is None, log.read_text()
            yield running
        finally:
            running.kill()
            running.wait(30)


def test_a_promotion_and_its_rollback_lose_no_request(endpoint: Endpoint, tmp_path: Path) -> None:
    old, new = endpoint.version("one"), endpoint.version("two")
    with Load(endpoint) as load:
        code, said = run(tmp_path, "promote", str(endpoint.exports / "two"), *_QUICK, "--min-agreement", "1")
        assert code == 0, said
        assert endpoint.served() == {new: 1.0}
        assert endpoint.state("two")[0] == "live"
        assert load.seen[new]
        assert endpoint.ask(old).status_code == 404  # it has ended
        code, said = run(tmp_path, "rollback", str(endpoint.exports))
        assert code == 0, said
        before = load.seen[old]
        until(lambda: load.seen[old] > before + 3, "the old version answers again")
    assert not load.lost
    assert endpoint.served() == {old: 1.0}
    assert endpoint.state("two") == ("rolled-back", "by hand")
    assert endpoint.ask().headers[VERSION_HEADER] == old
    code, said = run(tmp_path, "rollback", str(endpoint.exports))
    assert code == 2
    assert "no version before" in said


def test_a_version_with_other_answers_goes_back_before_anybody_is_sent_to_it(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    with Load(endpoint) as load:
        code, said = run(tmp_path, "promote", str(endpoint.exports / "noisy"), *_QUICK, "--min-agreement", "0.9")
    assert code == 5, said
    assert "of its greedy answers are the live version's" in said
    assert set(load.seen) == {endpoint.version("one")}
    assert not load.lost
    assert endpoint.served() == {endpoint.version("one"): 1.0}
    assert endpoint.state("noisy")[0] == "rolled-back"


def test_a_version_that_fails_goes_back_and_what_it_had_not_begun_is_answered(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    new = endpoint.version("two")
    options = ("--steps", "0.5,1", "--step-seconds", "60", "--min-requests", "20")
    with Load(endpoint) as load, _promoting(endpoint, "two", tmp_path / "log", *options) as running:
        until(lambda: load.seen[new] > 3, "the new version answers")
        os.kill(_replica_of(endpoint, new), signal.SIGKILL)
        assert running.wait(120) == 5
    said = (tmp_path / "log").read_text()
    assert "answers failed" in said
    assert endpoint.served() == {endpoint.version("one"): 1.0}
    # Only what the killed replica had begun to answer may be lost: at most the streams that ran.
    assert len(load.lost) <= 4
    assert all("replica" in one or "could not finish" in one for one in load.lost)


def _replica_of(endpoint: Endpoint, version: str) -> int:
    """The process of a version's replica, which Ray names after its application."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                title = (folder / "cmdline").read_text()
            except OSError:
                continue  # it has ended since
            if "ServeReplica" in title and version in title:
                return int(folder.name)
    raise AssertionError(f"no process runs {version}")


def test_a_version_that_hangs_goes_back_and_the_live_one_answers_what_it_was_asked(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    hangs = endpoint.exports / "two.hangs"
    options = ("--steps", "0.5,1", "--step-seconds", "100", "--max-token-wait", "3")
    try:
        with Load(endpoint) as load, _promoting(endpoint, "two", tmp_path / "log", *options) as running:
            hangs.touch()
            began = time.monotonic()
            assert running.wait(120) == 5
            took_s = time.monotonic() - began
            until(lambda: endpoint.served() == {endpoint.version("one"): 1.0}, "the live version has everything")
    finally:
        hangs.unlink(missing_ok=True)
    said = (tmp_path / "log").read_text()
    assert "by waiting more than 3 s for a token" in said
    assert took_s < 60, said
    assert not load.lost


def test_a_second_endpoint_over_the_same_exports_is_refused(
    endpoint: Endpoint, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    kept = registry.read(endpoint.exports)
    code, said = run(tmp_path, write_spec(tmp_path, {"other": endpoint.exports / "two"}, free_port()))
    assert code == 2, said
    assert f"another endpoint that runs, the one at {endpoint.url}" in said
    assert registry.read(endpoint.exports) == kept
    assert endpoint.ask().status_code == 200


def test_an_interrupted_promotion_goes_back(endpoint: Endpoint, tmp_path: Path) -> None:
    (beside := tmp_path / "beside").mkdir()
    with _promoting(endpoint, "two", tmp_path / "log", "--steps", "0.5,1", "--step-seconds", "100") as running:
        other, said = run(beside, "promote", str(endpoint.exports / "noisy"))
        assert other == 2
        assert "being changed by another promotion" in said
        running.send_signal(signal.SIGTERM)
        assert running.wait(120) == 130
    assert endpoint.served() == {endpoint.version("one"): 1.0}
    assert endpoint.state("two") == ("rolled-back", "interrupted")


def test_the_traffic_comes_back_when_the_promotion_is_killed(endpoint: Endpoint, tmp_path: Path) -> None:
    old, new = endpoint.version("one"), endpoint.version("two")
    with _promoting(endpoint, "two", tmp_path / "log", "--steps", "0.5,1", "--step-seconds", "100") as running:
        running.kill()
        running.wait(30)
    until(lambda: endpoint.served() == {old: 1.0, new: 0.0}, "the lease ends", 60)
    code, said = run(tmp_path, "versions", str(endpoint.exports), "--json")
    assert code == 0
    assert json.loads(said)["shares"] == {"m": {old: 1.0, new: 0.0}}
    code, said = run(tmp_path, "promote", str(endpoint.exports / "two"), *_QUICK[:4], "--min-requests", "0")
    assert code == 0, said  # what was left behind is ended first, and time alone lets the steps pass
    assert endpoint.served() == {new: 1.0}


def _answers(endpoint: Endpoint) -> bool:
    try:
        return endpoint.ask().status_code == 200
    except httpx.HTTPError:  # Serve's proxy has nobody whom it could ask
        return False


def test_who_was_promoted_answers_after_the_board_and_all_fronts_have_died(endpoint: Endpoint, tmp_path: Path) -> None:
    (live,) = endpoint.served()
    name = "one" if live == endpoint.version("two") else "two"
    code, said = run(tmp_path, "promote", str(endpoint.exports / name), *_QUICK[:4], "--min-requests", "0")
    assert code == 0, said
    record = registry.read_endpoint(endpoint.exports)
    assert record is not None
    command = [sys.executable, "-c", _KILL, record.address, str(record.token)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "SERVE_REPLICA::rayswift SERVE_REPLICA::rayswift-m-" in done.stdout  # a front, and the live version's engine
    until(lambda: _answers(endpoint), "somebody answers again", 240)
    assert endpoint.ask().headers[VERSION_HEADER] == endpoint.version(name)
    assert endpoint.served() == {endpoint.version(name): 1.0}
    code, said = run(tmp_path, "rollback", str(endpoint.exports))
    assert code == 0, said
    assert endpoint.served() == {live: 1.0}
