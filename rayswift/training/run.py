"""One rank's whole run: resume, build, loop, close. No Ray: how rows arrive is given by the caller.

Ray Train's workers and the forked ranks of the tests run this same function.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace

import pyarrow as pa
import torch

from rayswift.config.job import Job
from rayswift.data.blocks import local_blocks, step_inputs
from rayswift.data.collate import Filler
from rayswift.data.ledger import Ledger
from rayswift.data.media import KINDS
from rayswift.data.quarantine import Quarantine
from rayswift.data.stream_json import stream_json
from rayswift.data.types import StepInput
from rayswift.errors import CheckpointError, DataError
from rayswift.methods import Method
from rayswift.models.folder import rendering_sha256
from rayswift.models.loading import local_folder
from rayswift.parallel.engine import Engine
from rayswift.parallel.mesh import find_device
from rayswift.planning.layout import Seat
from rayswift.training import checkpoint
from rayswift.training.build import base_sha256, broadcast, build_engine, build_method
from rayswift.training.checkpoint import CheckpointManifest
from rayswift.training.evaluate import Evaluator
from rayswift.training.hooks import RunHooks
from rayswift.training.lock import sole_writer
from rayswift.training.loop import train
from rayswift.training.media import media_encoder, media_filler
from rayswift.training.metrics import RunLog
from rayswift.training.order import WorkOrder
from rayswift.training.row_record import RowRecord
from rayswift.training.run_dir import HELD_OUT_QUARANTINE, QUARANTINE, STREAM, RunDir
from rayswift.training.saver import Saver
from rayswift.training.self_check import self_check
from rayswift.training.shares import Shares
from rayswift.training.state import Horizon, TrainState

OpenBlocks = Callable[[WorkOrder, Seat, Ledger], Callable[[], Iterable[pa.Table]]]
"""Given its seat and the ledger to continue from, called by all ranks: how this rank opens its blocks. Only the first
rank of a data group opens them (see `shares`)."""


def run_rank(order: WorkOrder, seat: Seat, local_rank: int, open_blocks: OpenBlocks) -> TrainState:
    """The state after training to the end. The process group is up, with gloo on the host."""
    with sole_writer(RunDir(order.job.run_dir)) if seat.rank == 0 else nullcontext():
        return _run(order, seat, local_rank, open_blocks)


def _run(order: WorkOrder, seat: Seat, local_rank: int, open_blocks: OpenBlocks) -> TrainState:
    job, plan, rank = order.job, order.plan, seat.rank
    device = find_device(plan.device, local_rank)
    torch.manual_seed(job.train.seed)
    run_dir = RunDir(job.run_dir)
    removed = checkpoint.clean(run_dir) if rank == 0 else []
    manifest = _agree_on_checkpoint(job, run_dir, rank)
    state = _initial_state(order, manifest)
    rendered_with = _rendered_with(job, manifest)
    read = open_blocks(order, seat, state.ledger)
    filler = _filler(order)  # not in the thread: transformers' lazy imports do not bear two at once
    steps = Shares(seat, lambda: _step_inputs(order, read(), filler))
    method = build_method(job)
    engine = build_engine(job, plan, seat, device)
    if manifest is not None:
        _load(engine, f"{job.run_dir}/{checkpoint.folder_name(manifest.step)}")
    checked = self_check(engine, order, rank) if job.train.self_check else None
    log = RunLog(run_dir, job, up_to_step=state.step) if rank == 0 else None
    if log is not None:
        log.event("start", state.step, world_size=plan.layout.world_size, device=str(device), pid=os.getpid())
        if checked is not None:
            log.event("self_check", state.step, **asdict(checked))
        if removed:
            log.event("removed", state.step, checkpoints=removed, reason="not whole")
    saver = Saver(job.run_dir, job.train.keep_checkpoints, saved_step=manifest.step if manifest else None)
    horizon = Horizon(job.train, order.train_stream.num_rows_total)
    hooks = RunHooks(
        job=job,
        plan=plan,
        engine=engine,
        horizon=horizon,
        device=device,
        saver=saver,
        log=log,
        evaluator=_evaluator(order, engine, method, filler),
        quarantine=_quarantine(order, run_dir) if rank == 0 else None,
        held_out_quarantine=_held_out_quarantine(order, run_dir) if rank == 0 else None,
        rows=_row_record(order, run_dir, seat, manifest, state.ledger),
        rendered_with=rendered_with,
    )
    try:
        hooks.before_first_step(state)
        state = train(engine, method, steps, state, horizon, hooks)
        _check_trained(state)
        hooks.after_last_step(state)
        if log is not None:
            log.event("end", state.step)
    finally:
        steps.close()
        if log is not None:
            log.close()
    saver.close()
    return state


def local_open(order: WorkOrder, seat: Seat, ledger: Ledger) -> Callable[[], Iterable[pa.Table]]:
    """This rank's blocks prepared in its own process, without Ray: for tests and benches."""
    from rayswift.models.loading import load_tokenizer

    tokenizer = load_tokenizer(order.job.model.path)
    return lambda: local_blocks(
        order.train_stream,
        tokenizer,
        data_rank=seat.data_rank,
        data_size=seat.data_size,
        global_batch_size=order.job.train.global_batch_size,
        ledger=ledger,
        media=media_encoder(order.job.model.path, order.train_stream.settings),
    )


def _agree_on_checkpoint(job: Job, run_dir: RunDir, rank: int) -> CheckpointManifest | None:
    """The newest valid checkpoint, as rank 0 sees it. Called after `clean`, which has just read its contents."""
    found = checkpoint.find_newest(run_dir, verify=False) if rank == 0 else None
    if found is not None:
        _check_job(job, found)
    agreed = broadcast(found.model_dump() if found else None)
    return CheckpointManifest.model_validate(agreed) if agreed else None


def _check_job(job: Job, manifest: CheckpointManifest) -> None:
    """Raises CheckpointError when another job made it, or an adapter would go on beside another base than its own.

    A checkpoint of full fine-tuning holds every weight, so what the base holds now does not matter.
    """
    if changes := checkpoint.differences(manifest, job):
        raise CheckpointError(
            f"was made by a different job ({'; '.join(changes)})",
            path=f"{job.run_dir}/{checkpoint.folder_name(manifest.step)}",
            fix="give this job another name",
        )
    if job.needs_base and manifest.base_sha256 not in (None, base_sha256(job.model.path)):
        raise CheckpointError(
            f"was made with other weights in {job.model.path}: the base model has changed since",
            path=f"{job.run_dir}/{checkpoint.folder_name(manifest.step)}",
            fix="restore the base model, or give the run another name",
        )


def _check_trained(state: TrainState) -> None:
    """Raises DataError on every rank for a run that met no row it can use: a loss of 0 would look like success."""
    if not state.ledger.rows_trained:
        raise DataError(
            f"none of the {state.ledger.rows_visited} rows read is trained on; {QUARANTINE} has the reason of each"
        )


def _initial_state(order: WorkOrder, manifest: CheckpointManifest | None) -> TrainState:
    if manifest is None:
        return TrainState(0, Ledger.start(order.train_stream.fingerprint))
    checkpoint.check_rows(manifest, order.train_stream.fingerprint, order.job.run_dir)
    checkpoint.check_rendering(manifest, order.job.model.path, order.job.run_dir)
    ledger = checkpoint.ledger_of(manifest)
    return TrainState(manifest.step, replace(ledger, layout=checkpoint.read_layout(order.job.run_dir, manifest)))


def _rendered_with(job: Job, manifest: CheckpointManifest | None) -> dict[str, str] | None:
    """As rows are rendered from the first one on: what that was stays unknown to a run that did not write it down."""
    if manifest is not None:
        return manifest.rendered_with  # and as it is now: that was checked
    return rendering_sha256(local_folder(job.model.path, weights=False))


def _quarantine(order: WorkOrder, run_dir: RunDir) -> Quarantine:
    return Quarantine(f"{run_dir.url}/{QUARANTINE}", order.train_stream.rows_at_stake, order.job.data.max_bad_fraction)


def _row_record(
    order: WorkOrder, run_dir: RunDir, seat: Seat, manifest: CheckpointManifest | None, ledger: Ledger
) -> RowRecord:
    """The record of rows, cut back to the checkpoint; rank 0 also writes down the stream that it is a record of."""
    if seat.rank == 0:
        run_dir.write_text(STREAM, stream_json(order.train_stream))
    step, head = (manifest.step, manifest.rows) if manifest else (0, None)
    layout = (ledger.chunk, ledger.layout) if ledger.layout else None
    return RowRecord(run_dir, seat, order.train_stream.fingerprint, step=step, head=head, layout=layout)


def _held_out_quarantine(order: WorkOrder, run_dir: RunDir) -> Quarantine | None:
    if order.eval_stream is None:
        return None
    rows = order.eval_stream.rows_at_stake
    return Quarantine(f"{run_dir.url}/{HELD_OUT_QUARANTINE}", rows, order.job.data.max_bad_fraction)


def _load(engine: Engine, url: str) -> None:
    state = engine.state()
    checkpoint.load_state(url, state)
    engine.load_state(state)


def _step_inputs(order: WorkOrder, blocks: Iterable[pa.Table], filler: Filler | None) -> Iterator[StepInput]:
    train = order.job.train
    return step_inputs(
        blocks,
        sequences_per_step=train.global_batch_size // order.plan.layout.data_size,
        micro_batch_size=train.micro_batch_size,
        pad_id=0,
        filler=filler,
    )


def _filler(order: WorkOrder) -> Filler | None:
    """What keeps every rank in every tower of the model: the same for rows trained on and held out."""
    streams = [order.train_stream, *([order.eval_stream] if order.eval_stream is not None else [])]
    kinds = tuple(kind for kind in KINDS if any(kind in stream.settings.media_kinds for stream in streams))
    settings = replace(order.train_stream.settings, media_kinds=kinds)
    return media_filler(media_encoder(order.job.model.path, settings), kinds)


def _evaluator(order: WorkOrder, engine: Engine, method: Method, filler: Filler | None) -> Evaluator | None:
    """Held-out rows are prepared by each data rank for itself: few, read once, and kept."""
    stream = order.eval_stream
    if stream is None:
        return None

    def read() -> Iterator[StepInput]:
        from rayswift.models.loading import load_tokenizer

        blocks = local_blocks(
            stream,
            load_tokenizer(order.job.model.path),
            data_rank=engine.data_rank,
            data_size=engine.data_size,
            global_batch_size=order.job.train.global_batch_size,
            ledger=Ledger.start(stream.fingerprint),
            media=media_encoder(order.job.model.path, stream.settings),
        )
        shares = _step_inputs(order, blocks, filler)
        while engine.sum_over_data([(share := next(shares)).num_sequences])[0]:
            yield share

    return Evaluator(engine, method, read)
