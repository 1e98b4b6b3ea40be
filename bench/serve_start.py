"""From nothing to the first answer, broken down, with the model's files cold and in the page cache.

Each start is a process of its own; a phase ends when what it waits for has answered. Cold files are dropped from the
page cache first (posix_fadvise), which a file system may ignore: the read before it says what a cold read costs here.

    python bench/serve_start.py [--engine local vllm] [--rounds 3] [--hidden 1024] [--layers 16]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

PHASES = ("import", "check", "ray", "serve", "replica", "first answer")


def make_model(folder: Path, hidden: int, layers: int) -> None:
    from rayswift.export.pipeline import export
    from rayswift.models.init import init_model

    text = folder.parent / "text.txt"
    text.write_text("\n".join(topics[name] for name in sorted(topics)))
    init_model(
        str(folder.parent / "base"), arch="qwen3", layers=layers, hidden_size=hidden, heads=hidden // 64,
        kv_heads=hidden // 128, vocab_size=4096, train_tokenizer_files=[str(text)], seed=0,
    )  # fmt: skip
    export(str(folder.parent / "base"), str(folder), verify=False)


def drop(folder: Path) -> None:
    """Have the kernel forget the pages of the folder's files."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: Path) -> float:
    """Seconds to read every file of the folder once; they are in the page cache then."""
    began = time.perf_counter()
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                while opened.read(2**24):
                    pass
    return time.perf_counter() - began


def start(folder: str, engine: str) -> None:
    """One start in this process, its phases on stdout as JSON."""
    marks = [("", time.perf_counter())]

    def mark(name: str) -> None:
        marks.append((name, time.perf_counter()))

    import socket
    from contextlib import closing

    import httpx

    from rayswift.cluster.session import session
    from rayswift.serving import app, controller
    from rayswift.serving.spec import ServeSpec

    mark("import")
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    spec = app.checked(ServeSpec(models={"m": folder}, port=port, engine=engine, max_model_len=512,
                                 kv_cache_bytes=2**28))  # fmt: skip
    mark("check")
    with session(None):
        mark("ray")
        with controller.serving(spec):
            mark("serve")
            controller.deploy(controller.APP_NAME, app.application(spec), route_prefix="/")
            controller.wait_until_answering(spec)
            mark("replica")
            body = {"model": "m", "prompt": "hello", "max_tokens": 1, "temperature": 0}
            assert httpx.post(f"{spec.url}/completions", json=body, timeout=60).status_code == 200
            mark("first answer")
    print(json.dumps({name: at - before for (_, before), (name, at) in pairwise(marks)}))


LOAD = """
import asyncio, json, sys, time
began = time.perf_counter()
from rayswift import plugins
from rayswift.serving.engine import EngineOptions
engine = plugins.load("serving.engines", sys.argv[2], path="engine")(
    sys.argv[1], EngineOptions(max_model_len=512, kv_cache_bytes=2**28))
imported = time.perf_counter()
asyncio.run(engine.start())
print("LOADED", json.dumps([imported - began, time.perf_counter() - imported]))
"""


def variables_of(engine: str, folder: Path) -> dict[str, str]:
    """The environment that a replica with this engine is given."""
    from rayswift.serving.placement import actor_options
    from rayswift.serving.spec import ServeSpec

    options = actor_options(ServeSpec(models={"m": str(folder)}, engine=engine))
    return dict(options["runtime_env"]["env_vars"])


def load(python: str, folder: Path, engine: str) -> float:
    """Seconds that the engine alone takes in a bare process: its imports, loading, and one token."""
    done = subprocess.run([python, "-c", LOAD, str(folder), engine], capture_output=True, text=True, check=True,
                          env=os.environ | variables_of(engine, folder))  # fmt: skip
    line = next(line for line in done.stdout.splitlines() if line.startswith("LOADED"))
    return float(sum(json.loads(line.removeprefix("LOADED"))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", nargs="+", default=["local", "vllm"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--start", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        start(args.start, args.engine[0])
        return
    from rayswift.serving.environment import interpreter_of

    with tempfile.TemporaryDirectory(prefix="rayswift-bench-") as place:
        folder = Path(place) / "model"
        make_model(folder, args.hidden, args.layers)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        drop(folder)
        cold_s, warm_s = read(folder), read(folder)
        print(f"{size / 2**20:.0f} MiB; read once cold {cold_s:.2f} s, from the page cache {warm_s:.2f} s; "
              f"medians of {args.rounds} starts, seconds")  # fmt: skip
        print(
            f"{'engine':7} {'files':5} {'engine alone':>13}"
            + "".join(f"{name:>14}" for name in PHASES)
            + "         sum"
        )
        for engine in args.engine:
            found = interpreter_of(engine, None)
            if found.problem:
                print(f"{engine}: {found.problem}")
                continue
            for files in ("cold", "warm"):
                rows, alone = [], []
                for _ in range(args.rounds):
                    prepare = drop if files == "cold" else read
                    prepare(folder)
                    alone.append(load(found.path, folder, engine))
                    prepare(folder)
                    command = [sys.executable, __file__, "--engine", engine, "--start", str(folder)]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    rows.append(json.loads(done.stdout.splitlines()[-1]))
                medians = [statistics.median(row[name] for row in rows) for name in PHASES]
                print(f"{engine:7} {files:5} {statistics.median(alone):13.2f}"
                      + "".join(f"{one:14.2f}" for one in medians) + f"{sum(medians):12.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
