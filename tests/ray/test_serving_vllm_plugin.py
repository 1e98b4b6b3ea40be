"""vLLM's processes, with what RaySwift has them run: they sleep while they wait on a CPU, and tell why they failed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from rayswift.models.init import init_model
from rayswift.models.loading import load_config
from rayswift.serving.engines.vllm import Vllm
from rayswift.serving.environment import interpreter_of

_FOUND = interpreter_of("vllm", None)
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(_FOUND.problem is not None, reason=f"no serving environment: {_FOUND.problem}"),
]
_TALK = """
import json, multiprocessing, time

def answer(handle, pipe):
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    asked, told = MessageQueue.create_from_handle(handle, 0), MessageQueue(1, 1)
    pipe.send(told.export_handle())
    asked.wait_until_ready(), told.wait_until_ready()
    while (seconds := asked.dequeue()) is not None:
        time.sleep(seconds)
        told.enqueue(seconds)

if __name__ == "__main__":
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    ours, theirs = multiprocessing.Pipe()
    asked = MessageQueue(1, 1)
    process = multiprocessing.get_context("spawn").Process(target=answer, args=(asked.export_handle(), theirs))
    process.start()
    told = MessageQueue.create_from_handle(ours.recv(), 0)
    asked.wait_until_ready(), told.wait_until_ready()
    for number in range(300):
        asked.enqueue(0)
        assert told.dequeue(timeout=20) == 0
    began = time.thread_time()
    asked.enqueue(0.8)
    assert told.dequeue(timeout=20) == 0.8
    waited = time.thread_time() - began
    asked.enqueue(None)
    process.join(20)
    print(json.dumps({"cpu_s": waited, "is_cpu": current_platform.is_cpu(), "exit": process.exitcode}))
"""


def test_a_process_that_waits_for_another_takes_no_cpu_and_misses_no_message(tmp_path: Path) -> None:
    script = tmp_path / "talk.py"
    script.write_text(_TALK)
    done = subprocess.run([_FOUND.path, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["exit"] == 0
    if told["is_cpu"]:  # of 0.8 s that a spinning one would take whole
        assert told["cpu_s"] < 0.3


_START = """
import asyncio, sys
from rayswift.errors import ServeError
from rayswift.serving.engine import EngineOptions
from rayswift.serving.engines.vllm import Vllm

async def started(folder, **options):
    engine = Vllm(folder, EngineOptions(kv_cache_bytes=2**20, **options))
    try:
        await engine.start()
        return engine.max_model_len
    except ServeError as error:
        return str(error)
    finally:
        await engine.close()

if __name__ == "__main__":
    print("fitted:", asyncio.run(started(sys.argv[1])))
    print("asked:", asyncio.run(started(sys.argv[1], max_model_len=2048)))
"""


def test_a_context_is_what_memory_holds_and_one_that_was_asked_for_is_refused_in_the_cores_words(
    tmp_path: Path, tiny_text: Path
) -> None:
    folder, script = tmp_path / "model", tmp_path / "start.py"
    init_model(
        str(folder), arch="qwen3", layers=2, hidden_size=128, heads=4, kv_heads=2, vocab_size=512,
        train_tokenizer_files=[str(tiny_text)], seed=0,
    )  # fmt: skip
    assert load_config(str(folder)).max_position_embeddings == 2048
    script.write_text(_START)
    done = subprocess.run(
        [_FOUND.path, str(script), str(folder)], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, **Vllm.environment, **Vllm.environment_on_cpu},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines() if line.startswith(("fitted: ", "asked: ")))
    assert 0 < int(told["fitted"]) < 2048
    assert int(told["fitted"]) % 256 == 0
    assert "max seq len (2048)" in told["asked"]
