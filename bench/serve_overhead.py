"""RaySwift's endpoint in front of vLLM against bare `vllm serve`: throughput and time to the first token, as ratios.

Both servers run at the same time over the same model with the same flags and are asked in turn, so that both see the
same machine. Streams of greedy completions from prompts of token ids; needs `make serve-env`.

    python bench/serve_overhead.py [--rounds 3] [--hidden 512] [--layers 8] [--haproxy] [--promotable]
        [--same-engine] [--keyed]

With --promotable fronts stand before the replicas, as promotions need them.
With --haproxy Ray Serve puts HAProxy before the replicas instead of a proxy of its own in Python.
With --same-engine bare vLLM gets what RaySwift gives its engine on a CPU: the variables of a replica, our plugins, by
which vLLM's processes sleep while they wait, and Ray's jemalloc. The ratio is then of the ingress alone, else of all.
With --keyed both ask for an API key.

Claim: throughput at least 0.95 of bare vLLM, median time to the first token at most +5 ms or 1.10x.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import httpx

_PROMPT_TOKENS, _NEW_TOKENS, _MAX_MODEL_LEN, _KV_BYTES = 64, 64, 512, 2**29
_CONCURRENCY = (1, 8, 32)
_REQUESTS_PER_WORKER = 4
_START_TIMEOUT_S = 300
_KEY = "a-key-of-both-servers"


@dataclass(frozen=True)
class Measured:
    """One server at one concurrency: generated tokens per second, and the median seconds to the first token."""

    tokens_per_second: float
    first_token_s: float


def make_model(folder: Path, hidden: int, layers: int, *, as_export: bool = False) -> None:
    from rayswift.models.init import init_model

    text = folder.parent / "text.txt"
    text.write_text("\n".join(topics[name] for name in sorted(topics)))
    init_model(
        str(folder), arch="qwen3", layers=layers, hidden_size=hidden, heads=hidden // 64, kv_heads=hidden // 128,
        vocab_size=4096, train_tokenizer_files=[str(text)], seed=0,
    )  # fmt: skip

    if as_export:
        from rayswift.export.pipeline import export

        export(str(folder), str(folder.with_name("export")), verify=False)


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[str], port: int, log: Path, variables: dict[str, str]) -> Iterator[str]:
    """The base URL of a server that answers, ended by SIGTERM in the end."""
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | variables, start_new_session=True)
    try:
        deadline, url = time.monotonic() + _START_TIMEOUT_S, f"http://127.0.0.1:{port}"
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(log.read_text()[-3000:])
            try:
                if httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.3)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


Server = tuple[str, list[str], int, dict[str, str]]
"""Name, command, port, variables."""


def endpoint(model: Path, place: Path, *, haproxy: bool, promotable: bool, keyed: bool) -> Server:
    """RaySwift's."""
    port, spec, key = free_port(), place / "serve.yaml", place / "key"
    key.touch(mode=0o600)
    key.write_text(_KEY)
    spec.write_text(json.dumps({
        "models": {"m": str(model)}, "port": port, "engine": "vllm", "max_concurrency": 32, "max_queued": 64,
        "max_model_len": _MAX_MODEL_LEN, "kv_cache_bytes": _KV_BYTES, "promotable": promotable,
        "api_key_file": str(key) if keyed else None,
    }))  # fmt: skip
    # HAProxy's threads would take the cores of the model on a small machine; its files are the run's own.
    proxy = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_HAPROXY_NBTHREAD": "1",
             "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(place / "haproxy.cfg"),
             "RAY_SERVE_HAPROXY_SOCKET_PATH": str(place / "admin.sock"),
             "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(place),
             "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(place / "server-state")} if haproxy else {}  # fmt: skip
    return "rayswift", [sys.executable, "-m", "rayswift.cli", "serve", str(spec)], port, proxy


def bare(model: Path, python: str, *, same_engine: bool, keyed: bool) -> Server:
    """vLLM's own, of the serving environment."""
    port = free_port()
    flags = ["--max-model-len", str(_MAX_MODEL_LEN), "--max-num-seqs", "32", "--enforce-eager", "--dtype", "float32",
             "--kv-cache-memory-bytes", str(_KV_BYTES), "--disable-log-stats", "--served-model-name", "m",
             "--disable-uvicorn-access-log", *(("--api-key", _KEY) if keyed else ())]  # fmt: skip
    variables = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING",
                 "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
                 "VLLM_PLUGINS": ""}  # fmt: skip
    command = [str(Path(python).parent / "vllm"), "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    return "vllm serve", [*command, *flags], port, replica_variables(model, python) if same_engine else variables


def replica_variables(model: Path, python: str) -> dict[str, str]:
    """What a replica's process is started with: the engine's variables, and the allocator that Ray preloads."""
    from rayswift.serving.placement import actor_options
    from rayswift.serving.spec import ServeSpec

    options = actor_options(ServeSpec(models={"m": str(model)}, engine="vllm"))
    code = "import os, ray; print(os.path.join(os.path.dirname(ray.__file__), 'core', 'libjemalloc.so'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    jemalloc = done.stdout.strip()
    assert os.path.isfile(jemalloc), f"Ray has no {jemalloc}"
    return {**options["runtime_env"]["env_vars"], "LD_PRELOAD": jemalloc}


async def ask(client: httpx.AsyncClient, url: str, prompt: list[int]) -> tuple[int, float]:
    """(generated tokens, seconds to the first chunk with text) of one streamed completion."""
    body = {"model": "m", "prompt": prompt, "max_tokens": _NEW_TOKENS, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    started, first, tokens = time.perf_counter(), None, 0
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                # Half a character is no text yet: vLLM sends an empty chunk then, RaySwift none.
                if first is None and any(choice["text"] or choice["finish_reason"] for choice in chunk["choices"]):
                    first = time.perf_counter() - started
                if usage := chunk.get("usage"):
                    tokens = usage["completion_tokens"]
    assert first is not None, "a stream without a chunk"
    return tokens, first


async def measure(url: str, concurrency: int, seed: int) -> Measured:
    draw = random.Random(seed)
    prompts = [
        [draw.randrange(300, 4000) for _ in range(_PROMPT_TOKENS)] for _ in range(concurrency * _REQUESTS_PER_WORKER)
    ]
    queue = iter(prompts)

    async def work(client: httpx.AsyncClient) -> list[tuple[int, float]]:
        return [await ask(client, url, prompt) for prompt in queue]

    limits = httpx.Limits(max_connections=concurrency)
    headers = {"Authorization": f"Bearer {_KEY}"}  # one that asks for none does not look at it
    async with httpx.AsyncClient(timeout=300, trust_env=False, limits=limits, headers=headers) as client:
        await ask(client, url, prompts[0][::-1])
        started = time.perf_counter()
        done = [one for many in await asyncio.gather(*(work(client) for _ in range(concurrency))) for one in many]
        wall = time.perf_counter() - started
    return Measured(sum(tokens for tokens, _ in done) / wall, statistics.median(first for _, first in done))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--haproxy", action="store_true")
    parser.add_argument("--promotable", action="store_true")
    parser.add_argument("--same-engine", action="store_true")
    parser.add_argument("--keyed", action="store_true")
    args = parser.parse_args()
    from rayswift.serving.environment import interpreter_of

    found = interpreter_of("vllm", None)
    if found.problem:
        sys.exit(found.problem)
    with tempfile.TemporaryDirectory(prefix="rayswift-bench-") as place, ExitStack() as stack:
        model = Path(place) / "model"
        make_model(model, args.hidden, args.layers, as_export=args.promotable)
        if args.promotable:  # only exports have versions
            model = model.with_name("export")
        urls = {
            name: stack.enter_context(running(command, port, Path(place) / f"{port}.log", variables))
            for name, command, port, variables in (
                endpoint(model, Path(place), haproxy=args.haproxy, promotable=args.promotable, keyed=args.keyed),
                bare(model, found.path, same_engine=args.same_engine, keyed=args.keyed),
            )
        }
        print("concurrency  server       tokens/s   first token   (medians of", args.rounds, "rounds, asked in turn)")
        for concurrency in _CONCURRENCY:
            results: dict[str, list[Measured]] = {name: [] for name in urls}
            for number in range(args.rounds):
                for name in list(urls)[:: 1 if number % 2 else -1]:
                    results[name].append(asyncio.run(measure(urls[name], concurrency, number)))
            for name, found_ in results.items():
                speed = statistics.median(one.tokens_per_second for one in found_)
                first = statistics.median(one.first_token_s for one in found_)
                print(f"{concurrency:11}  {name:11}  {speed:8.1f}   {first * 1000:8.1f} ms")
            pairs = list(zip(results["rayswift"], results["vllm serve"], strict=True))
            speeds = [a.tokens_per_second / b.tokens_per_second for a, b in pairs]
            firsts = [(a.first_token_s / b.first_token_s, (a.first_token_s - b.first_token_s) * 1000) for a, b in pairs]
            print(f"{'':11}  throughput x{statistics.median(speeds):.3f} ({' '.join(f'{one:.3f}' for one in speeds)}), "
                  f"first token x{statistics.median(one for one, _ in firsts):.3f} "
                  f"({' '.join(f'{one:.3f}' for one, _ in firsts)}) "
                  f"({statistics.median(ms for _, ms in firsts):+.1f} ms)", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
