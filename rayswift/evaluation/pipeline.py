"""From a target, a path to rows and names of tasks to a report. Knows the order: look, load, measure, ask, write."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayswift.config.job import is_hub_id
from rayswift.errors import ConfigError, ExportError, RaySwiftError
from rayswift.evaluation import harness, on_rows
from rayswift.evaluation.harness import Tasks
from rayswift.evaluation.report import (
    EvalReport,
    HarnessReport,
    Kind,
    Target,
    report_names,
    text_of,
    write,
    write_beside,
)
from rayswift.evaluation.rows import Rows, open_rows
from rayswift.export import kept
from rayswift.export.manifest import MANIFEST, current_versions
from rayswift.export.written import check_place
from rayswift.progress import Progress, Silent
from rayswift.serving import client

if TYPE_CHECKING:
    import openai
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rayswift.data.stream import StreamPlan
    from rayswift.evaluation import harness_models
    from rayswift.export.source import Source

DEFAULT_NEW_TOKENS, DEFAULT_BATCH_SIZE = 256, 8
_DEFAULT_LENGTH = 1024
_NO_ROWS = "no rows were given"


@dataclass(frozen=True)
class Settings:
    """What an evaluation was asked for. `max_new_tokens` 0 asks nothing; `max_length` None is the run's own, and for
    tasks what the model takes. `chat_template` None asks tasks as chats wherever there is a template."""

    format: str = "auto"
    limit: int | None = None
    max_length: int | None = None
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    model: str | None = None
    tasks: tuple[str, ...] = ()
    num_fewshot: int | None = None
    include_path: str | None = None
    chat_template: bool | None = None
    batch_size: int = DEFAULT_BATCH_SIZE


def evaluate(
    target: str,
    rows: str | None,
    settings: Settings,
    *,
    output: str | None = None,
    progress: Progress | None = None,
) -> EvalReport:
    """The report on a run, checkpoint, adapter, export, model folder or endpoint.

    It is written beside a run, into an export with its manifest and its card, and to `output`. Where an export does not
    take it, on read-only storage for one, that is told on stderr, and the report is returned all the same.

    Raises ConfigError for a target, rows, tasks or settings that cannot be, DataError when no row can be used,
    ServeError when an endpoint does not answer, and what loading a run raises.
    """
    began, progress = time.perf_counter(), progress or Silent()
    _check(target, rows, settings, output)
    what = None if client.is_url(target) else _opened(target)
    found = None
    if rows is not None:
        progress.phase("reading the rows")
        data = what.source.data if what is not None else None
        found = open_rows(rows, format_name=settings.format, limit=settings.limit, data=data)
    tasks = _tasks(target, settings, progress) if settings.tasks else None
    if what is None:
        report = _of_endpoint(target, found, tasks, settings, progress)
    else:
        report = _of_model(what, found, tasks, settings, progress)
    report = report.model_copy(update={"seconds": round(time.perf_counter() - began, 3)})
    names = report_names(rows, settings.tasks)
    place = write_beside(report, names)
    _keep(report, names, is_written=output is not None)
    if output is not None and output != place:
        _write_output(report, output)
    return report


def _write_output(report: EvalReport, output: str) -> None:
    """Raises RaySwiftError where it cannot be written; the work of hours is then on stderr, not lost."""
    try:
        write(report, output)
    except (OSError, RaySwiftError) as error:
        print(text_of(report), file=sys.stderr)
        reason = getattr(error.__cause__ or error, "strerror", None) or error
        raise RaySwiftError(f"cannot be written: {reason}", path="--output", value=output,
                            fix="the report stands above this line: copy it") from error  # fmt: skip


def _keep(report: EvalReport, names: tuple[str, str], *, is_written: bool) -> None:
    """Put the report into the export that it is of; what becomes of it there is told."""
    target = report.target
    if target.kind not in ("export", "adapter", "model"):
        return
    if target.version is None:
        if not is_written:
            print(f"note: {target.path} has no {MANIFEST}, so no report is kept with it; --output FILE keeps one",
                  file=sys.stderr)  # fmt: skip
        return
    try:
        name = kept.keep(report, target.path, *names)
    except ExportError as error:
        print(f"warning: {error}", file=sys.stderr)
        return
    print(f"note: kept as {os.path.join(target.path, name)}, in its manifest too", file=sys.stderr)


def _check(target: str, rows: str | None, settings: Settings, output: str | None) -> None:
    """Raises ConfigError for what can be seen to be wrong before anything is read."""
    is_url = client.is_url(target)
    if not is_url and "://" not in target and not os.path.exists(target) and not ("/" in target and is_hub_id(target)):
        raise ConfigError(
            "does not exist", path="TARGET", value=target,
            fix="give a run directory, a checkpoint, a model folder, or the URL http://HOST:PORT/v1 of an endpoint",
        )  # fmt: skip
    if rows is None and not settings.tasks:
        raise ConfigError("is needed, or --tasks", path="--rows", fix="write --rows data/held_out.jsonl")
    _check_task_settings(settings)
    if settings.model is not None and not is_url:
        raise ConfigError("names a model of an endpoint, and TARGET is none", path="--model", value=settings.model,
                          fix="leave it out")  # fmt: skip
    if rows is not None and is_url and not settings.max_new_tokens:
        raise ConfigError("leaves nothing to measure of an endpoint", path="--max-new-tokens", value=0,
                          fix="use 1 or more")  # fmt: skip
    if output is not None and os.path.isdir(output):
        raise ConfigError("is a folder", path="--output", value=output, fix="name a file in it")
    if output is not None and "://" not in output:
        check_place(os.path.dirname(output) or ".", field="--output")


def _check_task_settings(settings: Settings) -> None:
    """Raises ConfigError for settings of tasks where there are none."""
    given = {
        "--num-fewshot": settings.num_fewshot, "--include-path": settings.include_path,
        "--chat-template": settings.chat_template,
    }  # fmt: skip
    for option, value in given.items():
        if value is not None and not settings.tasks:
            raise ConfigError("is about tasks, and there are none", path=option, value=value, fix="name --tasks")


def _tasks(target: str, settings: Settings, progress: Progress) -> Tasks:
    progress.phase(f"loading {', '.join(settings.tasks)}")
    found = harness.open_tasks(settings.tasks, num_fewshot=settings.num_fewshot, include_path=settings.include_path)
    if client.is_url(target):
        harness.check_generates(found, target)
    return found


def _of_endpoint(
    url: str, rows: Rows | None, tasks: Tasks | None, settings: Settings, progress: Progress
) -> EvalReport:
    questions = on_rows.questions(rows) if rows is not None else None
    with client.connected(url) as connection:
        model = client.model_of(connection, url, settings.model)
        measured = on_rows.nothing(_NO_ROWS)
        if rows is not None and questions is not None:
            measured = on_rows.from_endpoint(connection, url, model, rows, questions, settings.max_new_tokens, progress)
        scores = None
        if tasks is not None:
            scores = _tasks_of_endpoint(connection, url, model, tasks, settings, progress)
    return EvalReport(
        target=Target(path=url, kind="endpoint", model=model),
        **measured,
        harness=scores,
        settings=_settings(settings, rows),
        versions=current_versions(),
        seconds=0.0,
    )


def _tasks_of_endpoint(
    connection: openai.OpenAI, url: str, model: str, tasks: Tasks, settings: Settings, progress: Progress
) -> HarnessReport:
    """What an endpoint's answers to tasks are worth."""
    from rayswift.evaluation import harness_models

    progress.phase(f"asking {', '.join(settings.tasks)} of {url}")
    chat = settings.chat_template is not False
    base = str(connection.base_url).rstrip("/")
    lm = harness_models.endpoint(base, model, connection.api_key, is_chat=chat, retries=client.RETRIES)
    with harness_models.told(url):
        return harness.measure(tasks, lm, limit=settings.limit, chat_template=chat)


@dataclass(frozen=True)
class _Opened:
    """A target that is no endpoint. `version` is that of an export, or of an adapter exported alone."""

    target: str
    source: Source
    kind: Kind
    version: str | None


def _opened(target: str) -> _Opened:
    from rayswift.evaluation.target import opened

    version = kept.version_evaluated(target)
    return _Opened(target, *opened(target), version)


def _of_model(
    what: _Opened, rows: Rows | None, tasks: Tasks | None, settings: Settings, progress: Progress
) -> EvalReport:
    from rayswift.evaluation.target import load, longest

    source = what.source
    length = longest(source, settings.max_length, _DEFAULT_LENGTH)
    plan = rows.stream(length, source.data, source.rendering) if rows is not None else None
    progress.phase("loading the model")
    model, tokenizer = load(source)
    lm = _of_harness(tasks, model, tokenizer, settings) if tasks is not None else None
    measured, scores = on_rows.nothing(_NO_ROWS), None
    found: dict[str, Any] = {"dtype": "float32", "device": model.device.type}
    if rows is not None and plan is not None:
        found |= {"max_length": length, "reading": _reading(rows, plan)}
        measured = on_rows.from_model(rows, plan, model, source, tokenizer, settings.max_new_tokens, progress)
    if tasks is not None and lm is not None:
        found |= {"task_max_length": lm.max_length, "batch_size": settings.batch_size}
        progress.phase(f"running {', '.join(settings.tasks)}")
        with harness.blamed():
            scores = harness.measure(tasks, lm, limit=settings.limit, chat_template=lm.is_chat)
    return EvalReport(
        target=_target(what),
        **measured,
        harness=scores,
        settings=_settings(settings, rows, **found),
        versions=current_versions(),
        seconds=0.0,
    )


def _of_harness(
    tasks: Tasks, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> harness_models.Loaded:
    """The model as one of the harness: asked as it is served, as chats where its tokenizer has a template."""
    from rayswift.data.templates import require_chat_template
    from rayswift.evaluation import harness_models

    is_chat = bool(tokenizer.chat_template) if settings.chat_template is None else settings.chat_template
    if is_chat:
        require_chat_template(tokenizer, path="--chat-template")
    lm = harness_models.loaded(
        model, tokenizer, is_chat=is_chat, max_length=settings.max_length, batch_size=settings.batch_size
    )
    harness.check_room(tasks, lm.max_length)
    return lm


def _target(what: _Opened) -> Target:
    source = what.source
    return Target(
        path=what.target, kind=what.kind, model=source.base, checkpoint=source.checkpoint, step=source.step,
        run_finished=source.finished, version=what.version,
    )  # fmt: skip


def _reading(rows: Rows, plan: StreamPlan) -> dict[str, Any]:
    """What the loss depends on beside the rows and the model."""
    rule = plan.settings.loss
    return {
        "rendering": plan.settings.rendering, "truncation": plan.settings.truncation, "turns": rule.turns,
        "weights": [dict(table) for table in rule.tables],
        **rows.source.model_dump(mode="json", include={"columns", "tags", "system"}),
    }  # fmt: skip


def _settings(settings: Settings, rows: Rows | None, **found: Any) -> dict[str, Any]:
    """As asked for, and what was found of it; a setting that has no meaning for what was measured is left out."""
    asked: dict[str, Any] = {"limit": settings.limit}
    if rows is not None:
        asked |= {"format": settings.format, "max_new_tokens": settings.max_new_tokens, "temperature": 0}
    if settings.tasks:
        asked |= {"tasks": list(settings.tasks), "num_fewshot": settings.num_fewshot,
                  "include_path": settings.include_path}  # fmt: skip
    return asked | found
