"""The function every Ray Train worker runs. Rank 0 opens the row stream, splits it by data rank and hands it out.

The stream is opened here and not by the driver, because after a restart it begins where the newest checkpoint
stands, which only the workers know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa

from rayswift.data.ledger import Ledger
from rayswift.training.run import WorkOrder


def work(config: dict[str, Any]) -> None:
    """Train this rank's part of the job to its end. Runs in a Ray Train worker, with the process group up."""
    import ray.train

    from rayswift.training.run import run_rank

    context = ray.train.get_context()
    run_rank(config["order"], context.get_world_rank(), context.get_local_rank(), _open_blocks)


def _open_blocks(order: WorkOrder, ledger: Ledger) -> Callable[[], Iterable[pa.Table]]:
    """How this data rank reads its share of the stream that rank 0 split."""
    import torch.distributed as dist

    from rayswift.data.pipeline import split_stream
    from rayswift.training.build import broadcast

    layout = order.plan.layout
    splits = None
    if dist.get_rank() == 0:
        splits = split_stream(
            order.train_stream,
            order.job.model.path,
            ledger=ledger,
            global_batch_size=order.job.train.global_batch_size,
            data_size=layout.data_size,
            num_workers=order.job.data.num_workers,
        )
    mine = broadcast(splits)[layout.data_rank(dist.get_rank())]
    return lambda: mine.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
