"""From a target and a path to rows to a report. Knows the order: look at both, load, measure, ask, write."""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayswift.config.job import is_hub_id
from rayswift.errors import ConfigError, DataError
from rayswift.evaluation import endpoint
from rayswift.evaluation.report import Answers, EvalReport, Kind, RowCounts, RowFile, Target, report_place, write
from rayswift.evaluation.rows import Conversations, Rows, conversations, open_rows
from rayswift.export.manifest import current_versions
from rayswift.progress import Progress, Silent
from rayswift.serving import client

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rayswift.evaluation.loss import HeldOut
    from rayswift.export.source import Source

DEFAULT_NEW_TOKENS = 256
_DEFAULT_LENGTH, _SHOWN = 1024, 5


@dataclass(frozen=True)
class Settings:
    """What an evaluation was asked for. `max_new_tokens` 0 asks nothing; `max_length` None is the run's own."""

    format: str = "auto"
    limit: int | None = None
    max_length: int | None = None
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    model: str | None = None


def evaluate(
    target: str, rows: str, settings: Settings, *, output: str | None = None, progress: Progress | None = None
) -> EvalReport:
    """The report on a run, checkpoint, adapter, model folder or endpoint; written beside a run, and to `output`.

    Raises ConfigError for a target, rows or settings that cannot be, DataError when no row can be used, ServeError when
    an endpoint does not answer, and what loading a run raises.
    """
    began, progress = time.perf_counter(), progress or Silent()
    _check(target, settings, output)
    progress.phase("reading the rows")
    found = open_rows(rows, format_name=settings.format, limit=settings.limit)
    report = (_of_endpoint if client.is_url(target) else _of_model)(target, found, settings, progress)
    report = report.model_copy(update={"seconds": round(time.perf_counter() - began, 3)})
    for place in dict.fromkeys(filter(None, (report_place(report.target, rows), output))):
        write(report, place)
    return report


def _check(target: str, settings: Settings, output: str | None) -> None:
    """Raises ConfigError for what can be seen to be wrong before anything is read."""
    is_url = client.is_url(target)
    if not is_url and "://" not in target and not os.path.exists(target) and not ("/" in target and is_hub_id(target)):
        raise ConfigError(
            "does not exist", path="TARGET", value=target,
            fix="give a run directory, a checkpoint, a model folder, or the URL http://HOST:PORT/v1 of an endpoint",
        )  # fmt: skip
    if settings.model is not None and not is_url:
        raise ConfigError("names a model of an endpoint, and TARGET is none", path="--model", value=settings.model,
                          fix="leave it out")  # fmt: skip
    if is_url and not settings.max_new_tokens:
        raise ConfigError("leaves nothing to measure of an endpoint", path="--max-new-tokens", value=0,
                          fix="use 1 or more")  # fmt: skip
    if output is not None and os.path.isdir(output):
        raise ConfigError("is a folder", path="--output", value=output, fix="name a file in it")


def _of_endpoint(url: str, rows: Rows, settings: Settings, progress: Progress) -> EvalReport:
    from rayswift.evaluation.answers import scored

    found = conversations(rows)
    if not found.questions:
        what = f": {found.not_asked[0]}" if found.not_asked else ", and texts have no answer"
        raise ConfigError(f"has no conversation to ask an endpoint{what}", path="--rows", value=rows.source.path,
                          fix="give conversations, or evaluate the run or its export")  # fmt: skip
    with client.connected(url) as connection:
        model = client.model_of(connection, url, settings.model)
        progress.phase(f"asking {len(found.questions)} questions of {url}")
        replies = endpoint.ask(connection, model, found.questions, settings.max_new_tokens)
    used = rows.num_rows - len(found.refused)
    return EvalReport(
        target=Target(path=url, kind="endpoint", model=model),
        rows=_counts(rows, used, 0, found.refused),
        loss=None,
        perplexity=None,
        loss_reason=endpoint.NO_LOSS,
        tokens=None,
        trained_tokens=None,
        answers=scored(found.questions, replies, found.not_asked),
        answers_reason=None,
        settings=_settings(settings),
        versions=current_versions(),
        seconds=0.0,
    )


def _of_model(target: str, rows: Rows, settings: Settings, progress: Progress) -> EvalReport:
    from rayswift.evaluation.loss import measure
    from rayswift.evaluation.target import load, longest, opened
    from rayswift.training.media import media_encoder

    source, kind = opened(target)
    plan = rows.stream(length := longest(source, settings.max_length, _DEFAULT_LENGTH))
    media = media_encoder(source.base, plan.settings)
    progress.phase("loading the model")
    model, tokenizer = load(source)
    progress.phase(f"measuring the loss on {rows.num_rows} rows")
    held_out = measure(model, plan, tokenizer, media)
    if not held_out.rows:
        raise DataError(f"has no row that can be used: {'; '.join(held_out.refused[:_SHOWN])}", path="--rows",
                        value=rows.source.path, fix="repair the rows, or name their --format")  # fmt: skip
    loss, reason = _loss(held_out)
    answers, why_not = _answers(rows, held_out, model, source, tokenizer, settings, progress)
    return EvalReport(
        target=_target(target, kind, source),
        rows=_counts(rows, len(held_out.rows), len(held_out.cut), held_out.refused),
        loss=loss,
        perplexity=_perplexity(loss),
        loss_reason=reason,
        tokens=held_out.num_tokens,
        trained_tokens=held_out.num_trained_tokens,
        answers=answers,
        answers_reason=why_not,
        settings=_settings(settings, max_length=length, dtype="float32", device=model.device.type),
        versions=current_versions(),
        seconds=0.0,
    )


def _loss(held_out: HeldOut) -> tuple[float | None, str | None]:
    """The mean loss, or why there is none."""
    if not held_out.count:
        return None, "no token of the rows counts"
    loss = held_out.loss_sum / held_out.count
    return (loss, None) if math.isfinite(loss) else (None, f"it is {loss}, no number")


def _perplexity(loss: float | None) -> float | None:
    """exp(loss); None for one that a float cannot hold."""
    return math.exp(loss) if loss is not None and loss < math.log(sys.float_info.max) else None


def _answers(
    rows: Rows,
    held_out: HeldOut,
    model: PreTrainedModel,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    progress: Progress,
) -> tuple[Answers | None, str | None]:
    """What the model answers, or why it was not asked. That an engine cannot decode it costs no loss."""
    from rayswift.evaluation.answers import answer, scored
    from rayswift.models.loading import local_folder

    if not settings.max_new_tokens:
        return None, "--max-new-tokens is 0"
    found: Conversations = conversations(rows, held_out.unusable)
    if not found.questions:
        return None, "the rows have no question with an answer" + "".join(f": {one}" for one in found.not_asked[:1])
    progress.phase(f"answering {len(found.questions)} questions")
    try:
        replies = answer(model, str(local_folder(source.base)), tokenizer, found.questions, settings.max_new_tokens)
    except ConfigError as error:
        return None, str(error)
    return scored(found.questions, replies, found.not_asked), None


def _target(target: str, kind: Kind, source: Source) -> Target:
    return Target(
        path=target, kind=kind, model=source.base, checkpoint=source.checkpoint, step=source.step,
        run_finished=source.finished,
    )  # fmt: skip


def _counts(rows: Rows, used: int, cut: int, refused: list[str]) -> RowCounts:
    return RowCounts(
        files=tuple(RowFile(path=file.path, sha256=file.sha256, num_rows=file.num_rows) for file in rows.files),
        format=rows.format,
        read=rows.num_rows,
        used=used,
        refused=len(refused),
        cut=cut,
        reasons=tuple(refused[:_SHOWN]),
    )


def _settings(settings: Settings, **found: Any) -> dict[str, Any]:
    """As asked for, and what was found of it; a setting that has no meaning for the target is left out."""
    asked = {"format": settings.format, "limit": settings.limit, "max_new_tokens": settings.max_new_tokens}
    return {**asked, "temperature": 0, **found}
