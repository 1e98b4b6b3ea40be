"""What the suite of real clusters shares: a Ray for an endpoint to run in, and ports that nobody listens at."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager

import pytest


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Finds a port of 127.0.0.1 that nobody listens at."""
    return _free_port


@pytest.fixture(scope="session")
def serving_ray(ray_temp_dir: str) -> Callable[[], AbstractContextManager[int]]:
    """Runs a private two-CPU Ray cluster in this process while its block lasts, and gives a port for an endpoint."""

    @contextmanager
    def running() -> Iterator[int]:
        import ray

        from rayswift.cluster.session import worker_python

        ray.init(
            address="local", num_cpus=2, _temp_dir=ray_temp_dir, include_dashboard=False, log_to_driver=False,
            configure_logging=False, object_store_memory=100 * 2**20, runtime_env=worker_python(),
        )  # fmt: skip
        try:
            yield _free_port()
        finally:
            ray.shutdown()

    return running


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
