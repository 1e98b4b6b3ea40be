"""Endpoints and promotions as processes of their own, as a user runs them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx
import torch
import yaml
from safetensors.torch import load_file, save_file

from rayswift.export.pipeline import export
from rayswift.serving import registry
from rayswift.serving.versions import VERSION_HEADER, version_of


def start(*arguments: str, out: IO[str]) -> subprocess.Popen[str]:
    """The command, with all that it says in `out`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rayswift.cli", *arguments]
    return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, text=True)


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    """The exit code of `rayswift serve ...` and what it has said."""
    with (folder / "log").open("w") as out:
        process = start("serve", *arguments, out=out)
        try:
            code = process.wait(400)
        finally:
            process.kill()  # nothing to one that has ended; another would hold the lock of its promotion
    return code, (folder / "log").read_text()


def until(condition: Callable[[], Any], what: str, timeout_s: float = 120) -> None:
    """Returns once it holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        threading.Event().wait(0.05)


def write_spec(folder: Path, models: Mapping[str, Path], port: int, engine: str = "local", **more: Any) -> str:
    """The serve spec of a promotable endpoint."""
    spec = {"models": {name: str(export) for name, export in models.items()}, "port": port, "engine": engine,
            "device": "cpu", "max_model_len": 512, "promotable": True, "cpus_per_replica": 0.5, **more}  # fmt: skip
    (file := folder / "serve.yaml").write_text(yaml.safe_dump(spec))
    return str(file)


@contextmanager
def serving(folder: Path, spec: str) -> Iterator[None]:
    """An endpoint that answers for the duration, and ends well."""
    log = folder / "log"
    with log.open("w") as out:
        running = start("serve", spec, out=out)
        try:
            until(lambda: "Serving" in log.read_text() or running.poll() is not None, "the endpoint answers", 240)
            assert running.poll() is None, log.read_text()
            yield
        finally:
            running.send_signal(signal.SIGTERM)
            assert running.wait(120) == 0, log.read_text()


def write_exports(model: Path, root: Path) -> Path:
    """A folder of exports: `one` and `two` answer alike, and the weights of `noisy` are noise."""
    folder, noisy = root / "exports", root / "noisy"
    folder.mkdir()
    export(str(model), str(folder / "one"), engine="local")
    export(str(folder / "one"), str(folder / "two"), engine="local")
    shutil.copytree(model, noisy)
    weights = load_file(noisy / "model.safetensors")
    torch.manual_seed(1)
    save_file({name: torch.randn_like(weight) for name, weight in weights.items()}, noisy / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    export(str(noisy), str(folder / "noisy"), engine="local")
    return folder


@dataclass
class Endpoint:
    """A promotable endpoint of the model `m`, whose versions lie in `exports`."""

    url: str
    exports: Path

    def version(self, name: str) -> str:
        return str(version_of(self.exports / name))

    def served(self) -> dict[str, float]:
        """The share of each version, as clients are told."""
        card = httpx.get(f"{self.url}/models/m", timeout=30).json()["rayswift"]
        return {one["version"]: one["share"] for one in card["versions"]}

    def state(self, name: str) -> tuple[str, str | None]:
        found = registry.read(self.exports).models["m"].get(self.version(name))
        return found.state, found.reason

    def ask(self, version: str | None = None) -> httpx.Response:
        body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "temperature": 0}
        headers = {VERSION_HEADER: version} if version else {}
        return httpx.post(f"{self.url}/chat/completions", json=body, headers=headers, timeout=60)


@dataclass
class Load:
    """Whole answers and streams without pause until it is left; what became of each."""

    endpoint: Endpoint
    seen: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._ask, args=(bool(i % 2),)) for i in range(4)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a request hangs"

    def _ask(self, stream: bool) -> None:
        body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 16, "stream": stream}
        with httpx.Client(timeout=60) as client:
            while not self._stop.is_set():
                try:
                    reply = client.post(f"{self.endpoint.url}/chat/completions", json=body)
                except httpx.HTTPError as error:
                    self.lost.append(f"no reply: {type(error).__name__}")
                    continue
                self.seen[reply.headers.get(VERSION_HEADER, "none")] += 1
                whole = not stream or (reply.text.endswith("[DONE]\n\n") and '"error"' not in reply.text)
                if reply.status_code != 200 or not whole:
                    self.lost.append(f"{reply.status_code} {reply.text[-200:]}")
