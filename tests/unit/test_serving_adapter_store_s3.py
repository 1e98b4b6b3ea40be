"""Adapters in an object store, over the protocol of S3: listed, fetched, fetched again, and nothing else."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from rayswift.errors import ConfigError
from rayswift.serving import adapter_store
from rayswift.serving.adapter_store import AdapterStore
from rayswift.serving.api_errors import ApiError
from rayswift.serving.engine import Adapter
from tests.s3_cases import s3_bucket

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(adapter_store, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(adapter_store, "_REFRESH_S", 60.0)
    opened = s3_bucket(monkeypatch)
    yield next(opened)
    for thread in threading.enumerate():  # what still looks at this storage would tell of it in another test
        if thread.name == adapter_store.LISTING:
            thread.join(60)
            assert not thread.is_alive()
    next(opened, None)


def upload(bucket: Any, path: str, weights: bytes, **config: Any) -> None:
    bucket.pipe_file(f"{path}/adapter_config.json", json.dumps({"peft_type": "LORA", **config}).encode())
    bucket.pipe_file(f"{path}/rayswift_base.json", b"{}")
    bucket.pipe_file(f"{path}/{WEIGHTS}", weights)


def found(store: AdapterStore, name: str) -> Adapter:
    return asyncio.run(store.find(name))


def _everywhere(monkeypatch: pytest.MonkeyPatch, bucket: Any, name: str, does: Callable[..., None]) -> None:
    """Gives the storage's file system another function, in every thread: fsspec makes one for each."""
    monkeypatch.setattr(bucket, name, does)
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (bucket, url.removeprefix("s3://")))


def until(holds: Callable[[], bool], limit_s: float = 20.0) -> None:
    end = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


def test_an_adapter_is_listed_fetched_and_fetched_again_after_a_change(bucket: Any) -> None:
    upload(bucket, "bucket/adapters/a", b"first")
    bucket.pipe_file("bucket/adapters/notes/readme.txt", b"no adapter")
    bucket.pipe_file("bucket/adapters/file", b"no folder")
    store = AdapterStore("s3://bucket/adapters/")
    until(lambda: store.names() == ["a"])
    folder = Path(found(store, "a").folder)
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", WEIGHTS, "rayswift_base.json"]
    inode = (folder / WEIGHTS).stat().st_ino
    found(store, "a")
    assert (folder / WEIGHTS).stat().st_ino == inode  # looked at, and not fetched
    upload(bucket, "bucket/adapters/a", b"other")  # as long as before: only the ETag tells
    assert found(store, "a").folder == str(folder)
    assert (folder / WEIGHTS).read_bytes() == b"other"
    upload(bucket, "bucket/adapters/team/b", b"nested")
    assert (Path(found(store, "team/b").folder) / WEIGHTS).read_bytes() == b"nested"
    upload(bucket, "bucket/adapters/c", b"new")
    until(lambda: store.names() == ["a", "c"])
    bucket.rm("bucket/adapters/a", recursive=True)
    until(lambda: store.names() == ["c"])
    with pytest.raises(ApiError, match="does not exist"):
        found(store, "a")


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/secret", "..", "a/b/c/d/e", "s3://bucket/secret"])
def test_a_name_that_would_leave_the_folder_is_no_adapter(bucket: Any, name: str) -> None:
    for path in ("bucket/secret", "bucket/adapters/a", "bucket/adapters/../secret"):
        upload(bucket, path, b"x")
    with pytest.raises(ApiError, match="does not exist") as caught:
        found(AdapterStore("s3://bucket/adapters"), name)
    assert caught.value.status == 404


def test_an_adapter_that_names_code_is_not_served(bucket: Any) -> None:
    upload(bucket, "bucket/adapters/a", b"x", auto_mapping={"parent_library": "os"})
    with pytest.raises(ApiError, match="does not exist"):
        found(AdapterStore("s3://bucket/adapters"), "a")


def test_an_adapter_written_while_it_is_fetched_is_fetched_whole(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(bucket, "bucket/adapters/a", b"first", r=8)
    own, pending = bucket.get_file, [b"second"]

    def get_file(remote: str, local: str) -> None:
        own(remote, local)
        if pending:  # after the old config, before the weights
            upload(bucket, "bucket/adapters/a", pending.pop(), r=16)

    _everywhere(monkeypatch, bucket, "get_file", get_file)
    store = AdapterStore("s3://bucket/adapters")
    folder = Path(found(store, "a").folder)
    assert not pending
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 16
    assert (folder / WEIGHTS).read_bytes() == b"second"


def test_a_storage_that_refuses_costs_no_copy_that_is_here(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    upload(bucket, "bucket/adapters/a", b"first")
    store = AdapterStore("s3://bucket/adapters")
    found(store, "a")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("Forbidden")

    _everywhere(monkeypatch, bucket, "info", refuse)
    assert (Path(found(store, "a").folder) / WEIGHTS).read_bytes() == b"first"
    with pytest.raises(ApiError, match="does not answer; try again shortly") as caught:
        found(store, "b")
    assert (caught.value.status, caught.value.headers["Retry-After"]) == (503, "10")
    assert found(store, "a").name == "a"
    assert caplog.text.count("s3://bucket/adapters/a cannot be fetched") == 1  # and not asked with every request
    assert "s3://bucket/adapters/b cannot be fetched: PermissionError Forbidden" in caplog.text


def test_without_the_package_of_the_storage_nothing_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that serves may run in another environment than the command line."""

    def absent(protocol: str) -> None:
        raise ImportError(f"Install {protocol}fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", absent)
    with pytest.raises(ConfigError, match=r"adapters=s3://bucket/a cannot be read from here: Install s3fs .*\[s3\]"):
        AdapterStore("s3://bucket/a")
