"""Real process groups for tests: gloo ranks forked from one warm process, in seconds and without Ray.

The ranks come from multiprocessing's fork server and not from pytest's own process, which may hold threads of torch
or Ray that a fork would leave in an unknown state.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_PRELOAD = [
    "torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "transformers", "peft", "tests.engine_cases",
    "transformers.models.qwen3.modeling_qwen3", "rayswift.training.run", "rayswift.parallel.sharding",
]  # fmt: skip
_COLLECTIVE_TIMEOUT_S = 120


class RankFailed(AssertionError):
    """A rank raised, died or did not end; the text is its traceback."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 240) -> list[Any]:
    """What `function(rank, *args)` returned on each rank. Raises RankFailed; no rank is left running.

    `function` is importable by name, and its arguments and results can be pickled.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(target=_rank, args=(function, rank, world_size, args, f"{folder}/store", pipes[rank][1]))
            for rank in range(world_size)
        ]
        try:
            for process, (_, sending) in zip(processes, pipes, strict=True):
                process.start()
                sending.close()  # so that the death of a rank ends its pipe
            return _gather([receiving for receiving, _ in pipes], time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
            for receiving, _ in pipes:
                receiving.close()


def _gather(pipes: list[Connection], deadline: float) -> list[Any]:
    """The ranks' results; the first failure is raised without waiting for ranks that now wait for the failed one."""
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        pending = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailed(f"ranks {sorted(pending.values())} did not end in time")
        failures = []  # all that are there: the one that came last may be another's "connection closed"
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pending[pipe]
            try:
                failed, result = pipe.recv()
            except EOFError:
                failed, result = True, "died"
            if failed:
                failures.append(f"rank {rank}:\n{result}")
            results[rank] = result
        if failures:
            raise RankFailed("\n".join(failures))
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    function: Callable[..., Any], rank: int, world_size: int, args: tuple[Any, ...], store: str, sending: Connection
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # as Ray Train and every launcher set it
    try:
        dist.init_process_group(
            "gloo", init_method=Path(store).as_uri(), rank=rank, world_size=world_size,
            timeout=timedelta(seconds=_COLLECTIVE_TIMEOUT_S),
        )  # fmt: skip
        answer = False, function(rank, *args)
    except BaseException:
        answer = True, traceback.format_exc()
    sending.send(answer)
    sending.close()
    os._exit(0)  # the group's threads are not worth a wait
