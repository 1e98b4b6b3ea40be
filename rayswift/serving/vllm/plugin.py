"""What vLLM runs in each of its processes, by the entry points `vllm.general_plugins`. Written against vLLM 0.32."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from typing import Any

_PR_SET_PDEATHSIG = 1
_LOOK_MS = 20


def end_with_parent() -> None:
    """Ask the kernel to end this process when its parent has ended; nothing in a process that vLLM did not start.

    vLLM's core goes on, with the model in memory, when the process that asks it was killed. Linux only.
    """
    parent = multiprocessing.parent_process()
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent.pid:  # it ended before it was asked for
        os._exit(1)


def sleep_while_waiting() -> None:
    """Have vLLM's processes sleep until there is a message for them, where the model runs on the CPU.

    They spin for a second after each message, which is right beside a GPU: on a CPU the core, waiting for its worker,
    takes as many cycles as the model itself.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.distributed.device_communicators import shm_broadcast

    class Sleeping(shm_broadcast.SpinCondition):  # type: ignore[misc]
        """Waits to be told of a message, and looks by itself now and then: a reader that is not subscribed yet, or was
        told while it read, is not told again."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "busy_loop_s": 0.0})

        def wait(self, timeout_ms: int | None = None) -> None:
            super().wait(_LOOK_MS if timeout_ms is None else min(timeout_ms, _LOOK_MS))

    shm_broadcast.SpinCondition = Sleeping
