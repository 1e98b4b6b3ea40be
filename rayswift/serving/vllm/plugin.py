"""What vLLM runs in each of its processes, by the entry point `vllm.general_plugins`: they end with who started them.

vLLM 0.32's core goes on, with the model in memory, when the process that asks it was killed. Linux only.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Ask the kernel to end this process when its parent has ended; nothing in a process that vLLM did not start."""
    parent = multiprocessing.parent_process()
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent.pid:  # it ended before it was asked for
        os._exit(1)
