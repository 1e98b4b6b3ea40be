"""What vLLM runs in each of its processes, by the entry points `vllm.general_plugins`. Written against vLLM 0.32."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from importlib.metadata import entry_points, version

GROUP, NAMES = "vllm.general_plugins", frozenset({"rayswift-end", "rayswift-reason", "rayswift-sleep"})
"""Where vLLM looks for what it is to run, and what is ours of it (see pyproject.toml)."""
_PR_SET_PDEATHSIG = 1
_NAP_S = 0.0001


def missing() -> frozenset[str]:
    """Those of ours that vLLM's processes will not run: the installed package is older than this code, or another."""
    return NAMES - {found.name for found in entry_points(group=GROUP)}


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
    """Have vLLM's processes sleep while they wait for each other's next message, where the model runs on the CPU.

    They spin for a second after each message, which is right beside a GPU: on a CPU the core, waiting for its worker,
    takes as many cycles as the model itself. (vLLM 0.32, 2026-11.) Only naps: of what vLLM does after that second,
    being told of a message over a socket, half the messages tell nobody when they come in quick succession.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or not version("vllm").startswith("0.32."):
        return
    from vllm.distributed.device_communicators import shm_broadcast

    class Napping(shm_broadcast.SpinCondition):  # type: ignore[misc]
        """Looks for a message every _NAP_S for as long as vLLM's own would spin."""

        def wait(self, timeout_ms: int | None = None) -> None:
            if time.monotonic() <= self.last_read + self.busy_loop_s:
                time.sleep(_NAP_S)
            else:
                super().wait(timeout_ms)

    shm_broadcast.SpinCondition = Napping
