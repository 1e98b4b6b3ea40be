"""What the command line and scripts call: plan, run, export. Reads top to bottom like the job it does."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from typing import TYPE_CHECKING, Any

from rayswift import plugins
from rayswift.config.job import Job
from rayswift.progress import Progress, Silent

if TYPE_CHECKING:
    from rayswift.cluster.preflight import Prepared
    from rayswift.evaluation.report import EvalReport
    from rayswift.export.adapter_record import AdapterManifest
    from rayswift.export.manifest import ExportManifest
    from rayswift.export.terms import QuantizeSpec
    from rayswift.planning.planner import Plan
    from rayswift.training.audit_report import AuditReport
    from rayswift.training.report import RunReport
    from rayswift.training.run_dir import RunDir


def plan(job: Job) -> Plan:
    """The plan for a job on the cluster it names, after its inputs were checked. Nothing is trained or written.

    Raises ConfigError, DataError or PlanError.
    """
    from rayswift.cluster.preflight import prepare
    from rayswift.cluster.session import session

    prepared = prepare(job)
    with session(job.cluster.address):
        return _plan(prepared)


def run(job: Job, *, progress: Progress | None = None) -> RunReport:
    """The report of the finished run. A run of the same name and job is continued from its newest checkpoint.

    Raises ConfigError, DataError, PlanError, CheckpointError or WorkerError; see `errors.py` for exit codes.
    """
    from rayswift.cluster.preflight import prepare
    from rayswift.training.run_dir import RunDir

    progress = progress or Silent()
    clock = _Phases()
    progress.phase("checking the job")
    clock.start("check")
    prepared = prepare(job)
    if prepared.finished and RunDir(prepared.job.run_dir).exists("report.json"):
        progress.phase("the run is already finished")
        return _existing_report(prepared)
    return _train(job, prepared, progress, clock)


def audit(run_dir: str) -> AuditReport:
    """What became of each row of a run, proved from its directory; `AuditReport.check` raises DataError (exit 4).

    Raises CheckpointError for a run without a checkpoint, DataError for one that does not say what it was to read.
    """
    from rayswift.training.audit import audit as audit_run

    return audit_run(run_dir)


def export(
    source: str,
    output: str,
    *,
    dtype: str | None = None,
    force: bool = False,
    quantize: QuantizeSpec | None = None,
    max_difference: float | None = None,
    engine: str = "auto",
    engine_bound: float | None = None,
    max_perplexity: float | None = None,
    num_held_out: int | None = None,
) -> ExportManifest:
    """The manifest of a verified Hugging Face folder made from a run, a checkpoint or a model folder.

    `max_difference` bounds how far its log-probabilities may be off the trained model's on average. `engine` is the
    serving engine that has to answer from it too: vllm, local, none, or auto, as for the command: the one that an
    endpoint takes here. `engine_bound` bounds how far that one's may be off on average. `max_perplexity` bounds the
    perplexity on `num_held_out` rows of the job, as a ratio to the trained model's, for an export that is not
    quantized: for the others `quantize` says both.

    Raises ExportError (exit 5) when it does not verify; then nothing is left at `output`.
    """
    from rayswift.export.pipeline import export as export_folder

    return export_folder(
        source, output, dtype=dtype, force=force, quantize=quantize, max_difference=max_difference, engine=engine,
        engine_bound=engine_bound, max_perplexity=max_perplexity, num_held_out=num_held_out,
    )  # fmt: skip


def export_adapter(source: str, output: str, *, force: bool = False) -> AdapterManifest:
    """The manifest of a verified peft folder with the LoRA adapter of a run, checkpoint or adapter folder.

    Raises ConfigError for a source without an adapter, ExportError (exit 5) when it does not verify.
    """
    from rayswift.export.adapter import export_adapter as write

    return write(source, output, force=force)


def evaluate(
    target: str,
    rows: str | None = None,
    *,
    output: str | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> EvalReport:
    """The held-out loss of a run, checkpoint or model folder on `rows`, and how good its or an endpoint's answers are.

    With `tasks`, names of the lm-evaluation-harness, also what they give; `rows` may then be None. `settings` are those
    of `evaluation.pipeline.Settings`. Raises ConfigError, DataError, CheckpointError, ServeError.
    """
    from rayswift.evaluation.pipeline import Settings
    from rayswift.evaluation.pipeline import evaluate as evaluate_target

    return evaluate_target(target, rows, Settings(**settings), output=output, progress=progress)


def _plan(prepared: Prepared) -> Plan:
    """Match the job with what engines support, what its method needs and what the connected cluster offers."""
    from rayswift.cluster.session import cluster_spec
    from rayswift.planning.planner import plan as make_plan

    job = prepared.job
    engines = {name: plugins.load("parallel.engines", name).capability for name in plugins.names("parallel.engines")}
    packages = {capability.requires for capability in engines.values()} - {None}
    return make_plan(
        job,
        prepared.shape,
        cluster_spec(job.cluster.device),
        engines=engines,
        needs=plugins.load("methods", job.method.name, path="method.name").needs,
        model_plan=prepared.model_plan,
        absent=frozenset(name for name in packages if importlib.util.find_spec(name) is None),
    )


def _open_run(job: Job, prepared: Prepared, made: Plan) -> RunDir:
    """The run directory with job.yaml as the user wrote it, defaults spelled out, and the plan.

    Written once the job is known to fit. A run that starts from nothing starts with nothing: what an attempt before
    its first checkpoint left would be taken for its own.
    """
    from rayswift.config.load import dump_job
    from rayswift.training.run_dir import RECORDS, RunDir

    run_dir = RunDir(prepared.job.run_dir)
    if prepared.checkpoint is None:
        for name in RECORDS:
            run_dir.remove(name)
    run_dir.write_text("job.yaml", dump_job(job))
    run_dir.write_text("plan.json", json.dumps(made.to_plain(), indent=1) + "\n")
    return run_dir


def _train(job: Job, prepared: Prepared, progress: Progress, clock: _Phases) -> RunReport:
    """Run the workers while a thread shows what they write, then report."""
    from rayswift.cluster.session import describe_session, session
    from rayswift.training.follow import Follower

    resumed_from = prepared.checkpoint.step if prepared.checkpoint else 0
    progress.phase(describe_session(job.cluster.address))
    clock.start("start Ray")
    threading.Thread(target=importlib.import_module, args=("rayswift.cluster.trainer",), daemon=True).start()
    with session(job.cluster.address):
        made = _plan(prepared)
        run_dir = _open_run(job, prepared, made)
        clock.start("start workers")
        progress.phase("starting workers" + (f", continuing after step {resumed_from}" if resumed_from else ""))
        with Follower(
            run_dir,
            on_step=lambda record: _show_step(record, progress, job.train.log_every),
            on_event=lambda event: _show_event(event, progress),
        ) as follower:
            _fit(prepared, made)
        clock.start("train", at=follower.first_step_at)
    clock.start("report")
    progress.phase("writing the report")
    return _report(prepared, made, clock, resumed_from)


def _fit(prepared: Prepared, made: Plan) -> None:
    from rayswift.cluster.trainer import fit
    from rayswift.training.order import WorkOrder

    fit(WorkOrder(prepared.job, made, prepared.train_stream, prepared.eval_stream))


def _show_step(record: dict[str, Any], progress: Progress, log_every: int) -> None:
    """Every `log_every`-th step, every evaluation, and the last step."""
    fraction = record.get("progress", 0.0)
    if record["step"] % log_every == 0 or "eval_loss" in record or fraction >= 1:
        progress.step(record, fraction)


def _show_event(event: dict[str, Any], progress: Progress) -> None:
    if event["event"] == "warning":
        progress.phase(f"warning: {event['message']}")
    elif event["event"] == "start":
        progress.phase(f"training on {event['world_size']} x {event['device']}, from step {event['step']}")


def _report(prepared: Prepared, made: Plan, clock: _Phases, resumed_from: int) -> RunReport:
    """Draw the report from what the workers left in the run directory."""
    from rayswift.training import checkpoint, report
    from rayswift.training.run_dir import EVENTS, METRICS, RunDir

    job = prepared.job
    run_dir = RunDir(job.run_dir)
    records = run_dir.read_jsonl(METRICS)
    manifest = checkpoint.read_manifest(newest := checkpoint.newest(job.run_dir, verify=False))
    ledger = checkpoint.ledger_of(manifest)
    held_out = [value for _, value in report.losses(records, "eval_loss")]
    trained = [value for _, value in report.losses(records, "loss")]
    events = [event["event"] for event in run_dir.read_jsonl(EVENTS)]
    finished = report.RunReport(
        name=job.name,
        run_dir=job.run_dir,
        steps=manifest.step,
        epochs=ledger.rows_visited / max(1, prepared.train_stream.rows_per_epoch),
        final_loss=trained[-1] if trained else None,
        eval_loss_first=held_out[0] if held_out else None,
        eval_loss_last=held_out[-1] if len(held_out) > 1 else None,
        tokens=ledger.tokens,
        tokens_per_second=report.steady_tokens_per_second(records),
        rows_read=ledger.rows_visited,
        rows_trained=ledger.rows_trained,
        rows_quarantined=len(run_dir.read_jsonl("quarantine.jsonl")),
        restarts_survived=events.count("start") - events.count("end"),
        resumed_from_step=resumed_from,
        phases_s=clock.seconds(),
        wall_s=sum(clock.seconds().values()),
        planned_memory_bytes=made.memory.total,
        peak_memory_bytes=max((r.get("peak_memory_bytes", 0) for r in records), default=0),
        checkpoint=newest,
        steps_skipped=sum(bool(record.get("skipped")) for record in records),
    )
    report.write_report(finished)
    return finished


def _existing_report(prepared: Prepared) -> RunReport:
    from rayswift.training.report import RunReport
    from rayswift.training.run_dir import RunDir

    return RunReport.model_validate_json(RunDir(prepared.job.run_dir).read_text("report.json"))


class _Phases:
    """Wall time per phase, in seconds: a phase lasts until the next one starts."""

    def __init__(self) -> None:
        self._starts: list[tuple[str, float]] = []

    def start(self, name: str, *, at: float | None = None) -> None:
        """A phase begins now, or began `at` a time of `time.perf_counter`."""
        self._starts.append((name, time.perf_counter() if at is None else at))

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase; the last one lasts until now."""
        ends = [at for _, at in self._starts[1:]] + [time.perf_counter()]
        return {name: round(end - at, 3) for (name, at), end in zip(self._starts, ends, strict=True)}
