"""`rayswift serve` as a process with HAProxy before its replica: keys, bounds, streams, and who can reach what.

Ray asks for its token here, as it does of a user who sets nothing; most other tests turn that off.
"""

from __future__ import annotations

import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import psutil
import pytest
import ray
import yaml
from ray.serve.generated.serve_pb2 import ASGIRequest
from ray.serve.generated.serve_pb2_grpc import ASGIServiceStub

from tests.log_cases import files_with
from tests.promotion_cases import serving, until

pytestmark = pytest.mark.ray
_KEY, _TOKEN = "ray-test-key-5b1f0c", "5b1f0c" * 8
_MAX_BODY_BYTES = 20_000
_MARKER, _LOGGED = "zanzibar-prompt-marker", "the-id-of-a-request-that-is-logged"
_SHORT: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 4, "temperature": 0}
_LONG: dict[str, Any] = _SHORT | {"max_tokens": 1900, "stream": True}
_PATH, _HEADERS = "/completions", {"Authorization": f"Bearer {_KEY}"}


@dataclass(frozen=True)
class _Endpoint:
    port: int
    count_ports: tuple[int, ...]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


def _named(name: str) -> list[psutil.Process]:
    """Processes of the endpoint, of Ray and of HAProxy, by a part of their command line."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # HAProxy has begun anew meanwhile
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A private folder, short because HAProxy's socket lies in it, below an id of 56 characters."""
    folder = Path(tempfile.mkdtemp(prefix="hap-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def endpoint(place: Path, tiny_model_dir: Path, free_port: Callable[[], int]) -> Iterator[_Endpoint]:
    """One answer at a time and none that waits, behind HAProxy."""
    port, *count_ports = free_port(), free_port(), free_port()
    for name, content in (("key", _KEY), ("token", _TOKEN)):
        (place / name).touch(mode=0o600)
        (place / name).write_text(content)
    spec = {"models": {"tiny": str(tiny_model_dir)}, "port": port, "api_key_file": str(place / "key"),
            "engine": "local", "device": "cpu", "max_concurrency": 1, "max_queued": 0, "max_model_len": 2048,
            "max_body_bytes": _MAX_BODY_BYTES}  # fmt: skip
    (place / "serve.yaml").write_text(yaml.safe_dump(spec))
    variables = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(count_ports[0]), "RAY_SERVE_HAPROXY_METRICS_PORT": str(count_ports[1]),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",  # in which a balancer would notice that a replica ends
        "RAY_AUTH_TOKEN_PATH": str(place / "token"), "RAYSWIFT_TMPDIR": str(place),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RAY_AUTH_MODE")
        environment.delenv("RAY_AUTH_TOKEN")
        for name, value in variables.items():
            environment.setenv(name, value)
        others = set(psutil.Process().children(recursive=True))  # as multiprocessing keeps, of the tests before
        with serving(place, str(place / "serve.yaml")):
            until(lambda: _is_straight(count_ports[0]), "HAProxy asks the replica, not the proxy it begins with", 30)
            yield _Endpoint(port, tuple(count_ports))
            processes = [one for one in psutil.Process().children(recursive=True) if one not in others]
        try:
            until(lambda: not _alive(processes), "all of its processes end", 180)  # Ray's agents take their time
        except AssertionError as error:
            raise AssertionError(f"still there: {_alive(processes)}") from error


def _alive(processes: list[psutil.Process]) -> list[list[str]]:
    """The command lines of those that run."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.cmdline())
    return found


def _is_straight(port: int) -> bool:
    with suppress(httpx.TransportError):  # HAProxy begins anew
        counts = httpx.get(f"http://127.0.0.1:{port}/stats;csv", trust_env=False).text.splitlines()
        return any(",SERVE_REPLICA" in line and ",UP" in line for line in counts)
    return False


@pytest.fixture
def client(endpoint: _Endpoint) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=endpoint.url, headers=_HEADERS, timeout=60, trust_env=False) as made:
        yield made


def test_a_key_is_asked_for_and_the_official_client_is_answered(endpoint: _Endpoint, client: httpx.Client) -> None:
    without = httpx.post(f"{endpoint.url}{_PATH}", json=_SHORT, trust_env=False)
    wrong = client.post(_PATH, json=_SHORT, headers={"Authorization": "Bearer wrong-key-000"})
    for refused, code in ((without, None), (wrong, "invalid_api_key")):
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        error = refused.json()["error"]
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, code)
    with openai.OpenAI(base_url=endpoint.url, api_key=_KEY, max_retries=0, timeout=60) as official:
        whole = official.completions.create(**_SHORT | {"max_tokens": 40})
        chunks = list(official.completions.create(**_LONG | {"max_tokens": 40}))
    assert len(chunks) > 10, "the answer comes at once, not as a stream"
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text


def test_a_body_that_is_too_large_is_refused(client: httpx.Client) -> None:
    """Told by its length, or sent without one: a chunked body that never ends."""
    sent = {"Content-Type": "application/json"}
    for body in (b" " * (_MAX_BODY_BYTES + 1), b" " * 2**24, (b" " * 2**16 for _ in range(1000))):
        refused = client.post(_PATH, content=body, headers=sent)
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")
    assert client.post(_PATH, json=_SHORT).status_code == 200


def test_a_client_that_goes_away_in_a_stream_frees_its_place_and_who_finds_none_is_told(client: httpx.Client) -> None:
    num_events = 40
    with client.stream("POST", _PATH, json=_LONG) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        begin = time.monotonic()
        assert len(list(islice(lines, 2 * num_events))) == 2 * num_events  # between two events is an empty line
        whole_s = (time.monotonic() - begin) / num_events * _LONG["max_tokens"]
        for stream in (False, True):
            refused = client.post(_PATH, json=_SHORT | {"stream": stream}, timeout=10)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert int(refused.headers["retry-after"]) >= 1
    gone = time.monotonic()
    until(lambda: client.post(_PATH, json=_SHORT).status_code == 200, "its place is free", 30)
    assert time.monotonic() - gone < whole_s / 2, "its answer was generated to the end"


def test_http_is_for_this_machine_and_only_counts_are_for_others(endpoint: _Endpoint) -> None:
    assert {one.laddr.ip for one in psutil.net_connections("tcp") if one.laddr.port == endpoint.port} == {"127.0.0.1"}
    found = {address for process in _named("/haproxy -") for address in _listening(process)}
    counts = {("0.0.0.0", port) for port in endpoint.count_ports}  # README says so
    assert found == {("127.0.0.1", endpoint.port), *counts}


@pytest.mark.usefixtures("endpoint")
def test_the_open_ports_of_a_replica_refuse_a_stranger() -> None:
    """Serve calls replicas by gRPC on all addresses, and what it is sent is unpickled."""
    (replica,) = _named("ray::ServeReplica")
    ports = [port for ip, port in _listening(replica) if not ip.startswith("127.")]
    (port,) = [one for one in ports if _grpc_code(one, _TOKEN) != grpc.StatusCode.UNIMPLEMENTED]  # others are Ray's own
    for token in (None, "0" * len(_TOKEN)):
        assert _grpc_code(port, token) == grpc.StatusCode.UNAUTHENTICATED


def _grpc_code(port: int, token: str | None) -> grpc.StatusCode:
    """How a request without content fails from the machine's network address."""
    metadata = [("authorization", f"Bearer {token}")] if token else []
    address = f"{ray.util.get_node_ip_address()}:{port}"
    with (
        grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        ASGIServiceStub(channel).HandleRequest(ASGIRequest(), metadata=metadata, timeout=20)
    return caught.value.code()


@pytest.mark.usefixtures("endpoint")
def test_no_dashboard_listens() -> None:
    """Whoever reached one could run jobs here. Ray runs the process all the same, for counts."""
    (dashboard,) = _named("dashboard/dashboard.py")
    assert [address for address in _listening(dashboard) if address[0].startswith("127.")] == []
    assert "--disable-frontend" in dashboard.cmdline()


@pytest.mark.usefixtures("endpoint")
def test_no_other_user_gets_into_the_folder_of_rays_sockets_and_logs(place: Path) -> None:
    """Ray itself lets everybody write to its own."""
    (folder,) = place.glob("rs-*")
    assert list(folder.glob("*/session_*/sockets/*"))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def _listening(process: psutil.Process) -> list[tuple[str, int]]:
    """(address, port) of all that it listens at."""
    return [(one.laddr.ip, one.laddr.port) for one in process.net_connections("tcp") if one.status == "LISTEN"]


@pytest.mark.usefixtures("endpoint")
def test_no_other_user_gets_at_the_socket_that_haproxy_is_ordered_by(place: Path) -> None:
    """Its own mode lets everybody write, and who does can have requests sent to himself, keys and all."""
    sockets = [Path(words[-1]) for words in map(str.split, Path("/proc/net/unix").read_text().splitlines())
               if words[-1].startswith(str(place)) and "/r/" not in words[-1]]  # fmt: skip
    assert sockets
    for socket in sockets:
        session = place / socket.relative_to(place).parts[0]
        assert stat.S_IMODE(session.stat().st_mode) == 0o700


@pytest.mark.usefixtures("endpoint")
def test_no_file_holds_what_a_client_has_asked(client: httpx.Client, place: Path) -> None:
    """Nor what it asked in vain, or in a place where nothing is asked: an URL. HAProxy and Serve write down URLs."""
    asked = _SHORT | {"prompt": f"What is {_MARKER}?"}
    wrong, broken = {"Authorization": "Bearer wrong-key-000"}, {"Content-Type": "application/json"}
    large = asked | {"stop": [_MARKER * (_MAX_BODY_BYTES // len(_MARKER))]}
    for expected, reply in (
        (200, client.post(_PATH, json=asked)),
        (200, client.post(_PATH, json=asked | {"stream": True})),
        (200, client.post(_PATH, json=_SHORT, params={"prompt": _MARKER})),
        (400, client.post(_PATH, json=asked | {_MARKER: 1})),
        (400, client.post(_PATH, json=asked | {"prompt": f"{_MARKER} " * 600})),
        (400, client.post(_PATH, content=f'{{"{_MARKER}": ', headers=broken)),
        (401, client.post(_PATH, json=asked, headers=wrong)),
        (404, client.post(_PATH, json=asked | {"model": _MARKER})),
        (404, client.get("/nothing", params={"prompt": _MARKER})),
        (405, client.get(_PATH, params={"prompt": _MARKER})),
        (413, client.post(_PATH, json=large)),
    ):
        assert reply.status_code == expected, reply.text
    client.post(_PATH, json=asked, headers={"X-Request-Id": _LOGGED})
    until(lambda: files_with(place, _LOGGED), "the requests are in a log", 20)
    assert files_with(place, _MARKER) == []
