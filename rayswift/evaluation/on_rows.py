"""What a model or an endpoint is worth on rows, as the fields of a report. Knows the order: the loss, then answers.

Knows nothing of tasks of the lm-evaluation-harness (`harness.py`).
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from rayswift.errors import ConfigError, DataError
from rayswift.evaluation import endpoint
from rayswift.evaluation.report import Answers, RowCounts, RowFile
from rayswift.evaluation.rows import Conversations, Rows, conversations
from rayswift.progress import Progress

if TYPE_CHECKING:
    import openai
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rayswift.data.stream import StreamPlan
    from rayswift.evaluation.loss import HeldOut
    from rayswift.export.source import Source

_SHOWN = 5


def questions(rows: Rows) -> Conversations:
    """What there is to ask an endpoint. Raises ConfigError when there is nothing."""
    found = conversations(rows)
    if not found.questions:
        what = f": {found.not_asked[0]}" if found.not_asked else ", and texts have no answer"
        raise ConfigError(f"has no conversation to ask an endpoint{what}", path="--rows", value=rows.source.path,
                          fix="give conversations, or evaluate the run or its export")  # fmt: skip
    return found


def nothing(reason: str) -> dict[str, Any]:
    """The fields of a report on rows where nothing was measured."""
    names = ("rows", "loss", "perplexity", "tokens", "trained_tokens", "answers")
    return dict.fromkeys(names) | {"loss_reason": reason, "answers_reason": reason}


def from_endpoint(
    connection: openai.OpenAI,
    url: str,
    model: str,
    rows: Rows,
    found: Conversations,
    max_new_tokens: int,
    progress: Progress,
) -> dict[str, Any]:
    """What an endpoint's answers to the rows are worth, as fields of a report."""
    from rayswift.evaluation.answers import scored

    progress.phase(f"asking {len(found.questions)} questions of {url}")
    replies = endpoint.ask(connection, model, found.questions, max_new_tokens)
    return nothing(endpoint.NO_LOSS) | {
        "rows": _counts(rows, rows.num_rows - len(found.refused), 0, found.refused),
        "answers": scored(found.questions, replies, found.not_asked),
        "answers_reason": None,
    }


def from_model(
    rows: Rows,
    plan: StreamPlan,
    model: PreTrainedModel,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    progress: Progress,
) -> dict[str, Any]:
    """What a model is worth on rows, as fields of a report."""
    from rayswift.evaluation.loss import measure
    from rayswift.training.media import media_encoder

    progress.phase(f"measuring the loss on {rows.num_rows} rows")
    held_out = measure(model, plan, tokenizer, media_encoder(source.base, plan.settings))
    if not held_out.rows:
        raise DataError(f"has no row that can be used: {'; '.join(held_out.refused[:_SHOWN])}", path="--rows",
                        value=rows.source.path, fix="repair the rows, or name their --format")  # fmt: skip
    loss, reason = _loss(held_out)
    answers, why_not = _answers(rows, held_out, model, source, tokenizer, max_new_tokens, progress)
    return {
        "rows": _counts(rows, len(held_out.rows), len(held_out.cut), held_out.refused),
        "loss": loss,
        "perplexity": _perplexity(loss),
        "loss_reason": reason,
        "tokens": held_out.num_tokens,
        "trained_tokens": held_out.num_trained_tokens,
        "answers": answers,
        "answers_reason": why_not,
    }


def _loss(held_out: HeldOut) -> tuple[float | None, str | None]:
    """The mean loss, or why there is none."""
    if not held_out.total.count:
        return None, "no token of the rows counts"
    loss = held_out.total.mean
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
    max_new_tokens: int,
    progress: Progress,
) -> tuple[Answers | None, str | None]:
    """What the model answers, or why it was not asked. That an engine cannot decode it costs no loss."""
    from rayswift.evaluation.answers import answer, scored
    from rayswift.models.loading import local_folder

    if not max_new_tokens:
        return None, "--max-new-tokens is 0"
    found: Conversations = conversations(rows, held_out.unusable)
    if not found.questions:
        return None, "the rows have no question with an answer" + "".join(f": {one}" for one in found.not_asked[:1])
    progress.phase(f"answering {len(found.questions)} questions")
    try:
        replies = answer(model, str(local_folder(source.base)), tokenizer, found.questions, max_new_tokens)
    except ConfigError as error:
        return None, str(error)
    return scored(found.questions, replies, found.not_asked), None


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
