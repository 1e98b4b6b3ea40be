"""Shared fixtures: real data, a tiny model, a private Ray folder, and a process that talks to nobody.

What a suite needs alone (a cluster, a served model) lives in that suite's own conftest or module.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest

# These machines are shared: an example that takes a second now took a millisecond before.
hypothesis.settings.register_profile("shared", deadline=None)
hypothesis.settings.load_profile("shared")

# Before anything imports torch or ray: one thread per process on a small box, no usage reports, no model hub,
# and a Ray token of their own, so that none is written into the home of whoever runs the tests.
os.environ.update(
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    RAY_AUTH_MODE="token",
    RAY_USAGE_STATS_ENABLED="0",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    MPLBACKEND="Agg",
)
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.pop("RAY_ADDRESS", None)  # a test must never join somebody's cluster

# A shell starts what it puts in the background deaf to Ctrl-C, and so would be every program that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; skips with the reason where it is absent."""
    folder = Path(os.environ.get("RAYSWIFT_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set RAYSWIFT_SHARED_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of a few thousand English words, enough to train a tokenizer of 512 tokens on."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n".join(topics[name] for name in sorted(topics)[:12]), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path) -> Path:
    """A Qwen3 of about 80k random parameters with a trained BPE tokenizer and a chat template. Treat as read-only."""
    from rayswift.models.init import init_model

    folder = tmp_path_factory.mktemp("model") / "tiny"
    init_model(
        str(folder), arch="qwen3", layers=2, hidden_size=32, heads=4, kv_heads=2, vocab_size=512,
        train_tokenizer_files=[str(tiny_text)], seed=0,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def ray_temp_dir() -> Iterator[str]:
    """A private folder for Ray sessions, short because Unix socket paths end at 107 characters."""
    folder = tempfile.mkdtemp(prefix="rayswift-test-", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def ray_local(ray_temp_dir: str) -> Iterator[None]:
    """A private two-CPU Ray cluster in this process, shut down after the test."""
    with _ray(ray_temp_dir):
        yield


@pytest.fixture(scope="module")
def ray_of_module(ray_temp_dir: str) -> Iterator[None]:
    """The same for all tests of a module, which leave nothing running there."""
    with _ray(ray_temp_dir):
        yield


@contextmanager
def _ray(ray_temp_dir: str) -> Iterator[None]:
    import ray

    from rayswift.cluster.session import worker_python

    ray.init(
        address="local", num_cpus=2, _temp_dir=ray_temp_dir, include_dashboard=False, log_to_driver=False,
        configure_logging=False, runtime_env=worker_python(),
    )  # fmt: skip
    yield
    ray.shutdown()
