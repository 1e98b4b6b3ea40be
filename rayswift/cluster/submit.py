"""Sends a job to a Ray cluster through its dashboard and follows it. Knows no training."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO
from urllib.parse import urlsplit

from rayswift.errors import ConfigError, WorkerError

_AGENT_TIMEOUT_S, _AGENT_POLL_S = 60.0, 1.0


@dataclass(frozen=True)
class Submission:
    """A job on the cluster as it was last seen: Ray's id and status, and its exit code once it has ended."""

    id: str
    status: str
    exit_code: int | None = None


def submit(
    job: str,
    overrides: Sequence[str],
    *,
    address: str | None,
    working_dir: str,
    wait: bool,
    log: TextIO | None = None,
) -> Submission:
    """The ended submission of `rayswift train JOB KEY=VALUE...`, or the one just sent when not waiting for it.

    `address` is the dashboard's URL; the job's log is printed to `log`, by default stdout. Raises ConfigError when no
    dashboard answers there, WorkerError when the job is refused or ends without an exit code.
    """
    log = log or sys.stdout
    client = _connect(address)
    submission = _send(
        client,
        entrypoint=shlex.join(["python", "-m", "rayswift.cli", "train", job, *overrides]),
        runtime_env={"working_dir": working_dir, **_local_python(client)},
        metadata={"rayswift_job": job},
    )
    print(f"submitted {submission}", file=log, flush=True)
    if wait:
        asyncio.run(_follow(client, submission, log))
        return _ended(client, submission)
    return Submission(submission, str(client.get_job_status(submission)))


def _connect(address: str | None) -> Any:
    from ray.job_submission import JobSubmissionClient

    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not address or "://" not in address:
        raise ConfigError("is no dashboard URL", path="address", value=address or "",
                          fix="give --address the dashboard URL that `ray start --head` printed")  # fmt: skip
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"does not answer: {reason}", path="address", value=address,
                          fix="check that the cluster runs and was started with a dashboard") from error  # fmt: skip


def _local_python(client: Any) -> dict[str, str]:
    """What a cluster on this machine needs to start this environment's Python; nothing for one elsewhere."""
    from rayswift.cluster.session import worker_python

    host = urlsplit(client.get_address()).hostname or ""
    return worker_python() if host == "localhost" or host.startswith("127.") else {}


def _send(client: Any, **job: Any) -> str:
    """The id of the submitted job. A cluster that has just started is given time for its first agent."""
    deadline = time.monotonic() + _AGENT_TIMEOUT_S
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise WorkerError(f"was not accepted: {str(error).strip().splitlines()[-1]}", path="job",
                                  value=job["entrypoint"], fix="check the cluster's dashboard") from error  # fmt: skip
            time.sleep(_AGENT_POLL_S)


async def _follow(client: Any, submission: str, log: TextIO) -> None:
    """Prints the job's log until it ends."""
    async for text in client.tail_job_logs(submission):
        print(text, end="", file=log, flush=True)


def _ended(client: Any, submission: str) -> Submission:
    info = client.get_job_info(submission)
    if info.status == "SUCCEEDED":
        return Submission(submission, str(info.status), 0)
    if info.driver_exit_code:
        return Submission(submission, str(info.status), int(info.driver_exit_code))
    raise WorkerError(f"ended as {info.status}: {info.message}", path="submission", value=submission,
                      fix=f"read it again with `ray job logs {submission}`")  # fmt: skip
