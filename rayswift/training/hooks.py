"""What happens after a step: record it, account for bad rows, evaluate, save. No Ray in here.

Called on every rank in the same order, because evaluation and saving are collective; rank 0 alone writes files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version

import torch
import torch.distributed as dist

from rayswift import __version__
from rayswift.config.job import Job
from rayswift.data.quarantine import Quarantine
from rayswift.data.types import BadRow
from rayswift.errors import DataError
from rayswift.parallel.engine import Engine
from rayswift.planning.planner import Plan
from rayswift.training import checkpoint
from rayswift.training.build import base_sha256
from rayswift.training.checkpoint import CheckpointManifest, FileEntry, RowsEntry
from rayswift.training.evaluate import Evaluator
from rayswift.training.loop import StepRecord
from rayswift.training.metrics import RunLog, step_metrics
from rayswift.training.row_record import RowRecord
from rayswift.training.saver import Saver
from rayswift.training.state import Horizon, TrainState

_VERSIONED = ("torch", "transformers", "ray", "peft")


class RunHooks:
    """The hooks of a real run. `log` and the quarantines are None but on rank 0, `evaluator` without held-out rows."""

    def __init__(
        self,
        *,
        job: Job,
        plan: Plan,
        engine: Engine,
        horizon: Horizon,
        device: torch.device,
        saver: Saver,
        log: RunLog | None,
        evaluator: Evaluator | None,
        quarantine: Quarantine | None,
        held_out_quarantine: Quarantine | None,
        rows: RowRecord,
        rendered_with: dict[str, str] | None,
    ) -> None:
        self._job, self._plan, self._engine, self._horizon = job, plan, engine, horizon
        self._device, self._saver, self._log = device, saver, log
        self._evaluator, self._quarantine, self._held_out_quarantine = evaluator, quarantine, held_out_quarantine
        self._rows = rows
        self._rendered_with = rendered_with
        self._group = dist.new_group(backend="gloo")

    def before_first_step(self, state: TrainState) -> None:
        """Evaluate the model a fresh run starts from, so that the report can say what training changed."""
        if state.step == 0 and self._evaluator is not None:
            loss = self._held_out_loss(self._evaluator)
            if self._log is not None:
                self._log.step({"step": 0, "epoch": 0.0, "eval_loss": loss})

    def after_step(self, state: TrainState, record: StepRecord) -> None:
        """See `Hooks`. Raises DataError on every rank once too many rows are bad."""
        metrics = step_metrics(state, record, self._horizon, self._device)
        ended = self._horizon.ended(state)
        if self._evaluator is not None and (ended or self._due(state, self._job.train.eval_every)):
            metrics["eval_loss"] = self._held_out_loss(self._evaluator)
        self._record(metrics)
        if record.num_bad_rows:
            self._account(record.bad_rows, self._quarantine)
        self._rows.add(state.step, record.row_keys, record.rows + record.num_bad_rows, record.layout)
        if not ended and self._due(state, self._job.train.save_every):
            self._save(state, finished=False)
        self._saver.poll()

    def after_last_step(self, state: TrainState) -> None:
        """Save the finished run, and wait until the checkpoint is committed."""
        self._save(state, finished=True)
        self._saver.wait()

    def _record(self, metrics: dict[str, object]) -> None:
        if self._log is not None:
            self._log.step(metrics)

    def _due(self, state: TrainState, every: int | None) -> bool:
        return every is not None and state.step % every == 0

    def _held_out_loss(self, evaluator: Evaluator) -> float:
        """The held-out loss; bad held-out rows have a budget of their own, so that they cannot vanish from it."""
        bad_rows = evaluator.read()
        if bad_rows is not None:
            self._account(bad_rows, self._held_out_quarantine)
        return evaluator.loss()

    def _account(self, mine: tuple[BadRow, ...], quarantine: Quarantine | None) -> None:
        """Bring the ranks' bad rows together; all ranks reach the same verdict on the budget."""
        gathered: list[tuple[BadRow, ...]] = [()] * dist.get_world_size()
        dist.all_gather_object(gathered, mine, group=self._group)
        verdict: list[str | None] = [None]
        if quarantine is not None:
            try:
                quarantine.add(row for rows in gathered for row in rows)
            except DataError as error:
                verdict = [str(error)]
        dist.broadcast_object_list(verdict, src=0, group=self._group)
        if verdict[0] is not None:
            raise DataError(verdict[0])

    def _save(self, state: TrainState, *, finished: bool) -> None:
        if self._log is not None:
            self._log.flush()
        rows = self._rows.commit(state.step)
        layout = self._rows.layout_of(state.ledger.chunk) if state.ledger.sequence else None
        manifest = self._manifest(state, finished, rows, layout)
        self._saver.save(state.step, self._engine.state(), manifest)

    def _manifest(
        self, state: TrainState, finished: bool, rows: RowsEntry | None, layout: str | None
    ) -> Callable[[dict[str, FileEntry]], CheckpointManifest]:
        def build(files: dict[str, FileEntry]) -> CheckpointManifest:
            if layout is not None:
                files = {**files, checkpoint.CHUNK: checkpoint.write_layout(self._job.run_dir, state.step, layout)}
            return CheckpointManifest(
                step=state.step,
                finished=finished,
                job_hash=self._job.job_hash(),
                job=self._job.model_dump(mode="json"),
                layout=asdict(self._plan.layout),
                engine=self._plan.engine,
                ledger=state.ledger.to_dict(),
                seed=self._job.train.seed,
                versions={"rayswift": __version__, **{name: version(name) for name in _VERSIONED}},
                base_sha256=base_sha256(self._job.model.path),
                rendered_with=self._rendered_with,
                rows=rows,
                files=files,
            )

        return build
