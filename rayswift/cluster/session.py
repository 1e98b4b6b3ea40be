"""Joins a Ray cluster, or starts one on this machine, and says what it offers. The only writer of RAY_* variables.

A cluster that was already running is joined and left running; one started here is stopped at the end, its log
folder kept when the run failed.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import ray

from rayswift.cluster import token_file
from rayswift.cluster.nodes import living_nodes, weakest_device
from rayswift.cluster.session_folder import RAY_FOLDER, end_haproxy, haproxy_files, make_folder
from rayswift.errors import PlanError, RaySwiftError, WorkerError
from rayswift.planning.hardware import ClusterSpec

_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a finished or failed worker is noticed
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_LD_PRELOAD_ON_WORKERS": "1",  # Ray's own jemalloc: tokenizing takes a fifth less time than under glibc
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # CPU tasks keep seeing the machine's GPUs, as Ray will do by default
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
}
_SET_BY_USER = frozenset(os.environ)
_KNOCK_TIMEOUT_S = 10.0
_OBJECT_STORE_BYTES = 2 * 10**9
_LOCAL_OBJECT_STORE_FRACTION = 0.2
_ACCELERATORS = {"GPU": "cuda", "NPU": "npu"}


def configure(scheduling_timeout_s: float = 300) -> None:
    """Set what Ray reads from the environment, before it is first imported where possible. User settings win."""
    timeout = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{scheduling_timeout_s:g}"}
    for name, value in {**_ENVIRONMENT, **timeout}.items():
        if name not in _SET_BY_USER:
            os.environ[name] = value


def is_token_asked() -> bool:
    """Whether the cluster of this process answers only to who has its token; so do those that `session` starts."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


@contextmanager
def session(address: str | None = None, *, token: bool = False) -> Iterator[bool]:
    """A Ray connection for the duration: the caller's own, the one at `address` or RAY_ADDRESS, or a fresh local one.

    Yields whether it is a fresh one, which nobody else uses.
    `token` sends this user's Ray token to a cluster that asks for one. Raises PlanError when a cluster at an address
    cannot be reached.
    """
    configure()
    if token and not ray.is_initialized():
        _send_token()
    if ray.is_initialized():
        yield False
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        _join(address)
        try:
            yield False
        finally:
            ray.shutdown()
        return
    folder = _start_local()
    try:
        yield True
    except BaseException as error:
        _stop_local(folder, keep=not _is_explained(error))
        raise
    else:
        _stop_local(folder)


def _is_explained(error: BaseException) -> bool:
    """Whether nobody needs Ray's logs to understand the error: it names its reason, or is the user's own wish."""
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, RaySwiftError) and not isinstance(error, WorkerError)
    )


def describe_session(address: str | None) -> str:
    """What `session` is about to do, for a person."""
    if ray.is_initialized():
        return "using the running Ray cluster"
    address = address or os.environ.get("RAY_ADDRESS")
    return f"joining the Ray cluster at {address}" if address and address != "local" else "starting Ray"


def cluster_spec(device: str) -> ClusterSpec:
    """What the connected cluster offers to a job that asks for this kind of device (`auto`: what it has)."""
    resources = ray.cluster_resources()
    found = next((kind for name, kind in _ACCELERATORS.items() if resources.get(name)), "cpu")
    device = _local_accelerator(found) if device == "auto" else device
    key = next((name for name, kind in _ACCELERATORS.items() if kind == device), "GPU")
    nodes = living_nodes(device)
    gpu, gpu_bytes = weakest_device(device, nodes)
    return ClusterSpec(
        device=device,
        num_devices=0 if device == "cpu" else 1 if device == "mps" else int(resources.get(key, 0)),
        num_cpus=resources.get("CPU", 0.0),
        memory_bytes=int(resources.get("memory", 0)),
        device_memory_bytes=gpu_bytes,
        gpu=gpu,
        num_nodes=len(nodes),
        nodes=nodes,
    )


def worker_python() -> dict[str, str]:
    """A runtime environment that lets workers start from a Python whose path has a space; usually empty.

    Ray 2.60 puts the path into a shell command as it is. Only for clusters whose nodes are this machine.
    """
    quoted = shlex.quote(sys.executable)
    return {} if quoted == sys.executable else {"py_executable": quoted}


def process_environment(cpus_per_process: float) -> dict[str, str]:
    """Variables of Ray processes: threads that fit their share of the cores, and what Ray Train hands on.

    On one core each this is the environment of every process of a local session, so that Ray starts them ahead of
    their use; a process with variables of its own is started when it is asked for, a second or two later.
    """
    handed_on = {name: value for name, value in os.environ.items() if name in _ENVIRONMENT or _is_for_train(name)}
    threads = str(max(1, int(cpus_per_process)))
    return {**handed_on, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}


def _is_for_train(name: str) -> bool:
    return name.startswith("RAY_TRAIN_")


def _send_token() -> None:
    """Ray reads the mode when it is imported, and joins an address that was named without a token. (ray 2.60)

    What the cluster's own record says goes before the environment: clusters of ours ask whatever that says.
    """
    if not is_token_asked():
        _set_token_mode()


def _ask_for_token() -> None:
    """Have a cluster of our own ask for the token, which its owner alone can read; Ray asks unless told not to.

    Its agents listen to the network: without a token whoever reaches this machine runs code as this user.
    """
    if "RAY_AUTH_MODE" in os.environ and not is_token_asked():
        mode = os.environ["RAY_AUTH_MODE"]
        print(f"note: RAY_AUTH_MODE={mode} is not followed: the Ray that is started here would run the code of "
              "whoever reaches this machine's ports", file=sys.stderr)  # fmt: skip
        _set_token_mode()
    token_file.keep_private()


def _set_token_mode() -> None:
    os.environ["RAY_AUTH_MODE"] = "token"
    cast("Any", ray)._raylet.Config.initialize("")


def _join(address: str) -> None:
    try:
        _knock(address)
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PlanError(
            f"cannot be reached: {reason}",
            path="cluster.address",
            value=address,
            fix="start it (ray up cluster.yaml), correct the address, or leave it null for a local cluster",
        ) from error


def _knock(address: str) -> None:
    """Raises OSError when nothing listens at HOST:PORT: Ray itself would go on trying for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        return  # `auto`, or a name that Ray resolves
    # A head node may listen on its network address only, and Ray takes that one for the loopback address too.
    hosts = [host, ray.util.get_node_ip_address()] if host in ("127.0.0.1", "localhost") else [host]
    for number, place in enumerate(hosts, 1):
        try:
            socket.create_connection((place, int(port)), timeout=_KNOCK_TIMEOUT_S).close()
            return
        except OSError:
            if number == len(hosts):
                raise


def _start_local() -> str:
    """Start a cluster of this machine's cores and accelerators; its temp folder is private and short for sockets."""
    # Nothing drains a node of one machine's own cluster: its watcher would only cost a process.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    _ask_for_token()
    haproxy = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
    folder = make_folder(haproxy=haproxy)
    if haproxy:
        files = haproxy_files(folder)
        os.environ.update({name: value for name, value in files.items() if name not in _SET_BY_USER})
    free = shutil.disk_usage("/dev/shm").free if sys.platform == "linux" else _OBJECT_STORE_BYTES
    object_store_bytes = max(100 * 10**6, min(_OBJECT_STORE_BYTES, int(free * _LOCAL_OBJECT_STORE_FRACTION)))
    try:
        _init_local(folder, object_store_bytes)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _stop_local(folder: str, *, keep: bool = False) -> None:
    ray.shutdown()
    end_haproxy(folder)
    if keep:
        print(f"Ray's logs of this session are kept in {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _init_local(folder: str, object_store_bytes: int) -> None:
    ray.init(
        address="local",
        num_cpus=max(2, os.cpu_count() or 1),
        include_dashboard=False,
        object_store_memory=object_store_bytes,
        logging_level=logging.ERROR,
        log_to_driver=False,
        _temp_dir=os.path.join(folder, RAY_FOLDER),
        runtime_env={"env_vars": process_environment(1), **worker_python()},
    )


def _local_accelerator(found: str) -> str:
    """Ray calls every GPU a GPU and does not count Apple's: ask torch only where one may be there."""
    if found == "cpu" and sys.platform != "darwin":
        return "cpu"
    import torch

    current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return current.type if current is not None else found
