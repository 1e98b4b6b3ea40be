"""What vLLM runs in each of its processes, by the entry points `vllm.general_plugins`. Written against vLLM 0.32."""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


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

    if current_platform.is_cpu():
        from vllm.distributed.device_communicators import shm_broadcast

        if isinstance(shm_broadcast.SpinCondition, type):  # not done before
            shm_broadcast.SpinCondition = functools.partial(shm_broadcast.SpinCondition, busy_loop_s=0.0)
