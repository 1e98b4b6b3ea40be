"""An object store on this machine that speaks S3, found through the environment as a real one is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.request import Request, urlopen

import pytest


def s3_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An s3fs file system with an empty `bucket`, on a private server; what a fixture yields from."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    urlopen(Request(f"http://127.0.0.1:{port}/moto-api/reset", method="POST")).close()  # servers share their memory
    settings = {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}
    for name, value in {**settings, "ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    files.mkdir("bucket")
    yield files
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
