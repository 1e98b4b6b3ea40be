"""vLLM's processes, with what RaySwift has them run: on a CPU they sleep while they wait for each other."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

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
