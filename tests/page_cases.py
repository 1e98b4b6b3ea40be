"""An endpoint over fake engines on a real port, for tests of the page that it shows."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.datastructures import Headers

from rayswift.export import manifest
from rayswift.serving.admission import Admission
from rayswift.serving.engine import FakeEngine
from rayswift.serving.http import build_asgi
from rayswift.serving.lineage import lineage_of
from rayswift.serving.prompts import PromptBuilder
from rayswift.serving.served import ServedModel
from rayswift.serving.spec import ServeSpec


@dataclass
class Page:
    """A running endpoint. `open_gate` lets the engines that a gate holds back go on."""

    url: str
    loop: asyncio.AbstractEventLoop
    engines: Mapping[str, FakeEngine]
    versions: list[str | None]
    """The version that each chat has asked for, oldest first."""

    def open_gate(self, name: str) -> None:
        gate = self.engines[name].gate
        assert gate is not None
        self.loop.call_soon_threadsafe(gate.set)


@contextmanager
def page_of(
    engines: Mapping[str, FakeEngine], prompts: PromptBuilder, folders: Mapping[str, Path] | None = None, **spec: Any
) -> Iterator[Page]:
    """An endpoint that answers with these engines until the context ends."""
    paths = {name: str((folders or {}).get(name, "unused")) for name in engines}
    models = {
        name: ServedModel(engine, prompts, Admission(4, 4), lineage=lineage_of(paths[name]))
        for name, engine in engines.items()
    }
    app, versions = build_asgi(ServeSpec(models=paths, **spec), models), list[str | None]()

    async def noting(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/v1/chat/completions":
            versions.append(Headers(scope=scope).get("x-rayswift-version"))
        await app(scope, receive, send)

    config = uvicorn.Config(noting, port=0, ws="none", lifespan="off", log_level="error", timeout_graceful_shutdown=2)
    server, loop = uvicorn.Server(config), asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve()))
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Page(f"http://127.0.0.1:{port}/", loop, engines, versions)
    finally:
        server.should_exit = True
        thread.join(30)
        loop.close()


def export_of(folder: Path, **fields: Any) -> Path:
    """A folder with nothing but the manifest of an export, some of whose fields are as given."""
    folder.mkdir(parents=True)
    made = manifest.ExportManifest(
        **{
            "base": "/models/of/somebody/base-8b", "base_sha256": "b" * 64, "method": "sft", "adapter": None,
            "dtype": "bfloat16", "job_hash": "c" * 64, "checkpoint_step": 50, "run_finished": True, "versions": {},
            "merge": None, "verify": None, "files": {}, **fields,
        }
    )  # fmt: skip
    manifest.write(made, folder)
    return folder
