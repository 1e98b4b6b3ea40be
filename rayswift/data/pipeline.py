"""The stream through Ray Data: chunks are prepared by tasks, in order, and dealt out to data ranks.

The only module of `data` that imports Ray. What a block holds is decided by `stream` and `prepare`; here is
only where it is computed. The tokenizer is loaded once per worker process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, DataIterator, Dataset, ExecutionResources

from rayswift.data.chunks import chunk_from, chunks_left
from rayswift.data.ledger import Ledger
from rayswift.data.stream import StreamPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_TASKS = 4096
_CHUNKS_PER_TASK = 8
"""Ray Data sees that a task has ended, and starts the next, up to 0.2 s later: a third of the time of a text chunk."""
_BLOCK_BYTES = 4 << 20
"""A task hands out its chunks one by one, about as many bytes as one of 2,048 rows of text has, and not all at once."""
_AHEAD_BYTES_PER_CPU = 32 << 20
"""Prepared rows that may wait in the object store, for each CPU of the cluster: about ten chunks of text. Without a
bound, hours of rows are prepared ahead on cores that the training step could use. With one that the chunks of all tasks
do not fit into, Ray starts a task only once nothing has moved for 10 s: 170 rows/s at 2 MiB."""


def stream_dataset(
    plan: StreamPlan,
    tokenizer_path: str,
    *,
    ledger: Ledger,
    global_batch_size: int,
    data_size: int,
    num_workers: int | None = None,
) -> Dataset:
    """The sequences from where `ledger` stands in stream order: in blocks of one rank's share of a step, or, where one
    rank reads them all, of about a chunk, so that Ray needs no task for each step.

    `read_shares` cuts them to shares either way.

    `num_workers` bounds the tasks that prepare chunks at the same time; None leaves it to Ray Data. Nothing runs
    before the dataset is read. A tokenizer that cannot be used raises in the first task, not here.
    """
    chunks = chunks_left(plan, ledger)
    borders = _borders(chunks, at_once=data_size == 1 and not plan.settings.media_kinds)
    work: dict[str, Any] = {"fn": _prepared, "concurrency": num_workers}
    if plan.settings.media_kinds:
        # Actors keep what they reserve: on one spare CPU the tasks behind them would never run.
        actors = ActorPoolStrategy(min_size=1, max_size=num_workers or _num_actors())
        work = {"fn": _MediaActor, "compute": actors, "num_cpus": 0}
    with DataContext.current(_context()):
        dataset = ray.data.range(len(borders) - 1, override_num_blocks=max(1, len(borders) - 1))
        dataset = dataset.map_batches(
            work.pop("fn"), batch_size=1, batch_format="numpy", **work,
            fn_kwargs={"plan": plan, "tokenizer_path": tokenizer_path, "ledger": ledger, "borders": borders},
        )  # fmt: skip
        if data_size == 1:
            return dataset
        return dataset.repartition(target_num_rows_per_block=global_batch_size // data_size, strict=True)


def split_stream(
    plan: StreamPlan,
    tokenizer_path: str,
    *,
    ledger: Ledger,
    global_batch_size: int,
    data_size: int,
    num_workers: int | None = None,
) -> list[DataIterator]:
    """One iterator per data rank; block k of the stream goes to rank k % data_size.

    Ray deals a block to the split with the fewest rows so far. Blocks are equal, so this takes turns, and a global
    batch holds the same sequences for any number of ranks. Arguments as in `stream_dataset`.
    """
    dataset = stream_dataset(
        plan,
        tokenizer_path,
        ledger=ledger,
        global_batch_size=global_batch_size,
        data_size=data_size,
        num_workers=num_workers,
    )
    return list(dataset.streaming_split(data_size, equal=False))


def _borders(chunks: range, *, at_once: bool) -> list[int]:
    """Between which chunks tasks begin and end. `at_once`: a task prepares several.

    The first tasks are small, so that rows are there soon, and the last, so that all workers end together. Where other
    tasks come behind, one must not keep its CPU while it waits to hand out what it has, and has one chunk; so have
    actors, which are given the next task before they have done one.
    """
    most = max(_CHUNKS_PER_TASK if at_once else 1, -(-len(chunks) // _MAX_TASKS))
    borders = [chunks.start]
    while borders[-1] < chunks.stop:
        done, left = borders[-1] - chunks.start, chunks.stop - borders[-1]
        borders.append(borders[-1] + max(1, min(most, done // 2, left // 3)))
    return borders


def _prepared(
    batch: dict[str, np.ndarray], plan: StreamPlan, tokenizer_path: str, ledger: Ledger, borders: list[int]
) -> Iterator[pa.Table]:
    """The chunks of a batch. A task: a worker process keeps its tokenizer, and starting none is faster for text."""
    from rayswift.training.media import media_encoder

    tokenizer, media = _tokenizer(tokenizer_path), media_encoder(tokenizer_path, plan.settings)
    for number in batch["id"]:
        for index in range(borders[number], borders[number + 1]):
            yield chunk_from(plan, index, tokenizer, ledger, media)


class _MediaActor:
    """Decodes and encodes media beside the training workers: an actor, which keeps processor and model config."""

    def __call__(self, batch: dict[str, np.ndarray], **given: Any) -> Iterator[pa.Table]:
        """As `_prepared`."""
        return _prepared(batch, **given)


def _num_actors() -> int:
    """One for each CPU that the cluster has to spare, at least one."""
    return max(1, int(ray.available_resources().get("CPU", 1.0)))


def read_shares(split: DataIterator, *, global_batch_size: int, data_size: int) -> Iterable[pa.Table]:
    """What a data rank reads of its iterator of `split_stream`: its share of each step, read ahead a little."""
    share = global_batch_size // data_size
    shares: Iterable[pa.Table] = split.iter_batches(batch_size=share, batch_format="pyarrow", prefetch_batches=2)
    return shares


def _context() -> Any:
    """Settings of this dataset alone: the caller's context is left as it is."""
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=_ahead_bytes())
    context.target_max_block_size = _BLOCK_BYTES
    context.execution_no_progress_timeout_s = -1  # a checkpoint may pause the consumer for as long as it takes
    context.memory_usage_poll_interval_s = None  # the sizes of the workers, which nobody reads
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return context


def _ahead_bytes() -> int:
    return int(_AHEAD_BYTES_PER_CPU * max(1.0, ray.cluster_resources().get("CPU", 1.0)))


@cache
def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Loaded once per worker process, whose collector then leaves alone what is there: looking through everything that
    transformers imports took a quarter of the time of every chunk."""
    import gc

    from rayswift.models.loading import load_tokenizer

    tokenizer = load_tokenizer(path)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)
    return tokenizer
