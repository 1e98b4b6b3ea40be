"""What a worker is sent. Loads no torch: Ray's controller unpacks it too, and starts a second sooner for it."""

from __future__ import annotations

from dataclasses import dataclass

from rayswift.config.job import Job
from rayswift.data.stream import StreamPlan
from rayswift.planning.planner import Plan


@dataclass(frozen=True)
class WorkOrder:
    """Everything a worker needs, small enough to pickle."""

    job: Job
    plan: Plan
    train_stream: StreamPlan
    eval_stream: StreamPlan | None
