"""What a plan warns of: it will run, and slower than a person may expect."""

from __future__ import annotations

from collections.abc import Iterator

from rayswift.config.job import Job
from rayswift.planning.hardware import ClusterSpec
from rayswift.planning.layout import Layout
from rayswift.planning.memory import tokens_per_worker
from rayswift.planning.slices import pipeline_bubble
from rayswift.planning.stages import STAGES_PER_RANK
from rayswift.planning.throughput import hiding_tokens
from rayswift.units import format_count


def warnings_of(job: Job, layout: Layout, cluster: ClusterSpec) -> tuple[str, ...]:
    """The warnings of a plan, each with what to change."""
    return (*_exposed_gathers(job, layout, cluster), *_idle_stages(job, layout))


def _exposed_gathers(job: Job, layout: Layout, cluster: ClusterSpec) -> Iterator[str]:
    """Too few tokens per micro-batch to compute on while the next block is gathered."""
    tokens, needed = tokens_per_worker(job, layout), hiding_tokens(layout, job.model.dtype, cluster)
    if needed is not None and tokens < needed:
        yield (
            f"{format_count(tokens)} tokens per worker and micro-batch are fewer than the {format_count(needed)} whose "
            "computation hides the gathers of this network; raise train.micro_batch_size or parallel.dp_replicate"
        )


def _idle_stages(job: Job, layout: Layout) -> Iterator[str]:
    """Fewer micro-batches than stages: some stages never compute at the same time."""
    stages, micro_batches = layout.pp * STAGES_PER_RANK[job.parallel.schedule], job.num_micro_batches(layout.data_size)
    if layout.pp > 1 and micro_batches < stages:
        bubble = pipeline_bubble(layout, job.parallel.schedule, micro_batches)
        yield (
            f"{micro_batches} micro-batches for {stages} stages leave each worker idle for {bubble:.0%} of a step; "
            "lower train.micro_batch_size or raise train.global_batch_size"
        )
