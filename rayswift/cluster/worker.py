"""The function every Ray Train worker runs. Rank 0 opens the row stream, splits it by data rank and hands it out.

The stream is opened here and not by the driver, because after a restart it begins where the newest checkpoint
stands, which only the workers know. While Ray Data's processes start, each rank prepares the first few rows itself.
Who sits where on the mesh is found here too: only the workers know which nodes they came to.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyarrow as pa

from rayswift.data.ledger import Ledger
from rayswift.errors import PlanError
from rayswift.planning.layout import Seat
from rayswift.planning.locality import arrange
from rayswift.planning.planner import Plan
from rayswift.training.order import WorkOrder


def work(config: dict[str, Any]) -> None:
    """Train this rank's part of the job to its end. Runs in a Ray Train worker, with the process group up."""
    import ray.train

    from rayswift.training.run import run_rank

    order: WorkOrder = config["order"]
    seat, local_rank = take_seat(order.plan, ray.train.get_context().get_world_rank())
    run_rank(order, seat, local_rank, _open_blocks)


def take_seat(plan: Plan, rank: int) -> tuple[Seat, int]:
    """This process's place on the mesh, and its number among the processes of its node. Called by all ranks.

    Ray's own local rank goes by IP address, which several nodes may share. Its workers see all devices that the run
    has on their node, in the order of their ranks. Raises PlanError when a tensor parallel group would cross nodes.
    """
    import ray

    nodes = _gathered(ray.get_runtime_context().get_node_id())
    order = arrange(nodes, plan.layout)
    if order is None:
        raise _torn_apart(plan, nodes)
    return Seat(plan.layout, rank, order), nodes[:rank].count(nodes[rank])


def _gathered(node: str) -> list[str]:
    """The node of every rank."""
    import torch.distributed as dist

    nodes = [node] * dist.get_world_size()
    if len(nodes) > 1:
        dist.all_gather_object(nodes, node)
    return nodes


def _torn_apart(plan: Plan, nodes: Sequence[str]) -> PlanError:
    """The refusal, with the ranks of each node."""
    from rayswift.cluster.nodes import picture

    ranks: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        ranks.setdefault(node, []).append(rank)
    return PlanError(
        "lets a tensor parallel group cross nodes: in no order do the workers fill their nodes with whole groups",
        path="parallel.tp",
        value=plan.layout.tp,
        fix=f"free whole nodes, or use a smaller parallel.tp\n{picture(plan.placement, ranks)}",
    )


def _open_blocks(order: WorkOrder, seat: Seat, ledger: Ledger) -> Callable[[], Iterable[pa.Table]]:
    """How this data rank reads its share of the stream: a head start of its own, then what rank 0 split.

    Ranks that are handed their rows by another one only take part in handing out the splits.
    """
    import torch.distributed as dist

    from rayswift.data.blocks import head_start
    from rayswift.models.loading import load_tokenizer
    from rayswift.training.prefetch import Prefetched

    head: list[pa.Table] = []
    rest = ledger  # media are decoded by Ray Data alone, off the processes that train
    reads = seat.data_leader(seat.data_rank) == seat.rank
    if (reads or seat.rank == 0) and not order.train_stream.settings.media_kinds:  # rank 0 needs `rest`
        head, rest = head_start(
            order.train_stream,
            load_tokenizer(order.job.model.path),
            data_rank=seat.data_rank,
            data_size=seat.data_size,
            global_batch_size=order.job.train.global_batch_size,
            ledger=ledger,
        )
    group = dist.new_group(backend="gloo")  # the stream is handed out in a thread, beside the model's collectives
    stream = Prefetched(lambda: _split_blocks(order, rest, seat.data_rank, reads, group))
    return lambda: itertools.chain(head, stream)


def _split_blocks(order: WorkOrder, ledger: Ledger, data_rank: int, reads: bool, group: Any) -> Iterable[pa.Table]:
    """This rank's blocks from `ledger` on, as Ray Data prepares them; none where another rank reads them."""
    import torch.distributed as dist

    from rayswift.data.pipeline import read_shares, split_stream
    from rayswift.training.build import broadcast

    splits = None
    if dist.get_rank() == 0:
        splits = split_stream(
            order.train_stream,
            order.job.model.path,
            ledger=ledger,
            global_batch_size=order.job.train.global_batch_size,
            data_size=order.plan.layout.data_size,
            num_workers=order.job.data.num_workers,
        )
    mine = broadcast(splits, group)[data_rank]
    if not reads:
        return []
    return read_shares(mine, global_batch_size=order.job.train.global_batch_size, data_size=order.plan.layout.data_size)
