"""The report of an evaluation: figures with all that is needed to repeat them, as JSON and as a small table."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from rayswift.training.run_dir import RunDir

Kind = Literal["run", "checkpoint", "adapter", "export", "model", "endpoint"]
_NAME_CHARS = 100
"""Of the name of a report; some file systems end names at 255 bytes."""


class Record(BaseModel):
    """Base of what a report holds: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Target(Record):
    """What was evaluated. `model` is the base of a run or adapter, or the name that an endpoint was asked for."""

    path: str
    kind: Kind
    model: str
    checkpoint: str | None = None
    step: int | None = None
    run_finished: bool | None = None
    version: str | None = None
    """Of an export, or of an adapter that was exported alone."""


class RowFile(Record):
    """A file that rows were read from. `num_rows` are those read of it."""

    path: str
    sha256: str
    num_rows: int


class RowCounts(Record):
    """What became of the rows: `read` is `used` and `refused`; `cut` ones were used up to the longest length."""

    files: tuple[RowFile, ...]
    format: str
    read: int
    used: int
    refused: int
    cut: int
    reasons: tuple[str, ...]
    """Of the first rows that were refused: `file:line: reason`."""


class Answered(Record):
    """One answer; of long texts only the end. `agrees` is None where no rule can tell."""

    row: str
    expected: str
    answer: str
    exact: bool
    agrees: bool | None


class Answers(Record):
    """What greedy answers are worth by `evaluation/scores.py`; fractions are None where nothing could be compared."""

    num_answered: int
    num_exact: int
    exact_match: float | None
    num_judged: int
    num_agreed: int
    accuracy: float | None
    """Of the judged ones: the others are no number and too long to compare as texts."""
    num_cut: int
    """Answers that were not finished after the most new tokens."""
    num_unanswered: int
    """Conversations that were not asked, or not answered."""
    unanswered: tuple[str, ...]
    """Why, of the first of them."""
    shown: tuple[Answered, ...]


class TaskScore(Record):
    """One metric of a task, over the answers that one of its filters keeps."""

    metric: str
    filter: str
    value: float | None
    stderr: float | None
    """None where the harness knows none: for one sample, and metrics without."""
    higher_is_better: bool | None


class TaskResult(Record):
    """What a task of the lm-evaluation-harness gave, or a group of tasks, which has `members`."""

    name: str
    members: tuple[str, ...]
    version: str | None
    """As its author counts: figures of two versions are not comparable."""
    output_type: str | None
    num_fewshot: int | None
    """None for a group whose members differ."""
    num_samples: int
    num_available: int | None
    sha256: str | None
    """Of documents, prompts and expected answers (the harness' task hash): equal ones were asked the same."""
    scores: tuple[TaskScore, ...]


class HarnessReport(Record):
    """What the lm-evaluation-harness measured."""

    version: str
    chat_template: bool
    """Whether questions were asked as chats; examples are then turns of their own."""
    tasks: tuple[TaskResult, ...]
    notes: tuple[str, ...]
    """What the harness warned of, such as prompts that were cut."""


class EvalReport(Record):
    """One evaluation. What could not be measured is None, and a reason stands beside it."""

    target: Target
    rows: RowCounts | None
    """None where only tasks were asked for."""
    loss: float | None
    """Nats per token that counts, as `eval_loss` of a run: by the data settings of the job behind the model; for a
    model of no job, by the defaults."""
    perplexity: float | None
    loss_reason: str | None
    tokens: int | None
    trained_tokens: int | None
    answers: Answers | None
    answers_reason: str | None
    harness: HarnessReport | None = None
    """None where no tasks were asked for."""
    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: float

    def summary(self) -> str:
        """The report as a small table of plain text."""
        lines = [("target", self._target())]
        if self.rows is not None:
            lines += [("rows", _rows(self.rows)), *(("refused", one) for one in self.rows.reasons)]
            lines += [("loss", self._loss()), *self._answers()]
        if self.harness is not None:
            lines += _tasks(self.harness)
        return "\n".join(f"{name:<12}  {text}" for name, text in lines)

    def _target(self) -> str:
        target = self.target
        more = {"endpoint": f", model {target.model}", "adapter": f" on {target.model}"}.get(target.kind, "")
        return f"{target.path}: {target.kind}{more}" + (f", step {target.step}" if target.step is not None else "")

    def _loss(self) -> str:
        if self.loss is None:
            return f"not measured: {self.loss_reason}"
        perplexity = "" if self.perplexity is None else f", perplexity {self.perplexity:.4g}"
        return f"{self.loss:.4f} per token{perplexity}, over {self.trained_tokens:,} of {self.tokens:,} tokens"

    def _answers(self) -> list[tuple[str, str]]:
        found = self.answers
        if found is None:
            return [("answers", f"not measured: {self.answers_reason}")]
        cut = f", {found.num_cut:,} cut off" if found.num_cut else ""
        lines = [
            ("answers", f"{found.num_answered:,}{cut}, {found.num_unanswered:,} not asked or not answered"),
            *(("unanswered", one) for one in found.unanswered),
            ("exact match", _share(found.exact_match, found.num_exact, found.num_answered)),
            ("accuracy", _share(found.accuracy, found.num_agreed, found.num_judged) + " that can be judged"),
        ]
        return lines


def _rows(rows: RowCounts) -> str:
    names = ", ".join(f"{os.path.basename(file.path)} ({file.sha256[:12]})" for file in rows.files[:3])
    more = f" and {len(rows.files) - 3} more" if len(rows.files) > 3 else ""
    cut = f", of which {rows.cut:,} were cut" if rows.cut else ""
    return f"{names}{more}: {rows.read:,} read, {rows.used:,} used{cut}, {rows.refused:,} refused"


def _tasks(found: HarnessReport) -> list[tuple[str, str]]:
    lines = [
        ("tasks", f"lm-evaluation-harness {found.version}, asked as {'chats' if found.chat_template else 'plain text'}")
    ]
    for task in found.tasks:
        fewshot = "" if task.num_fewshot is None else f", {task.num_fewshot}-shot"
        of = "" if task.num_available in (None, task.num_samples) else f" of {task.num_available:,}"
        about = f"{task.name} (version {task.version or 'unknown'}{fewshot}, {task.num_samples:,}{of} samples)"
        lines.append(("task", f"{about}: {', '.join(map(scored, task.scores)) or 'see its parts'}"))
    return lines + [("note", note) for note in found.notes]


def scored(score: TaskScore) -> str:
    """`exact_match 0.25 ± 0.1 (flexible-extract)`."""
    value = "unknown" if score.value is None else f"{score.value:.4g}"
    error = "" if score.stderr is None else f" ± {score.stderr:.2g}"
    return f"{score.metric} {value}{error}" + ("" if score.filter == "none" else f" ({score.filter})")


def write_beside(report: EvalReport, names: Sequence[str]) -> str | None:
    """The path of a report written beside the run that it is of, under its `name_among` those; None for others."""
    target = report.target
    if target.kind not in ("run", "checkpoint"):
        return None
    folder = target.path.rstrip("/")
    if target.kind == "checkpoint":
        above, _, name = folder.rpartition("/")[0].rpartition("/")
        folder = above if name == "checkpoints" else folder.rpartition("/")[0]
    run = RunDir(folder or ".")
    path = f"{folder or '.'}/{name_among(report, names, lambda one: run.read_bytes(one) if run.exists(one) else None)}"
    write(report, path)
    return path


def report_names(rows: str | None, tasks: Sequence[str] = ()) -> tuple[str, str]:
    """`eval-ROWS.json`, or `eval-tasks-TASKS.json` where there are tasks alone; and one that tells where the rows lie.

    The second has a hash of their whole path: many data sets have a `test.jsonl`.
    """
    base = "-".join(["tasks", *tasks]) if rows is None else rows.rstrip("/").rsplit("/", 1)[-1]
    stem = base if rows is None else base.rpartition(".")[0] or base
    name = re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "rows"
    if len(name) > _NAME_CHARS:
        name = f"{name[:_NAME_CHARS]}-{_short_hash(name)}"
    where = base if rows is None else rows if "://" in rows else os.path.abspath(rows)
    return f"eval-{name}.json", f"eval-{name}-{_short_hash(where)}.json"


def name_among(report: EvalReport, names: Sequence[str], read: Callable[[str], bytes | None]) -> str:
    """The one of `report_names` to keep a report under: the first, unless that is of other rows.

    A report of the same rows is replaced, wherever it is. `read` returns what a file holds, None where it is absent.
    """
    first, second = names
    if read(second) is not None:
        return second
    old = read(first)
    return second if old is not None and _is_of_others(old, report) else first


def _is_of_others(content: bytes, report: EvalReport) -> bool:
    """Whether it is a report of other files: none by its path, and not the same contents elsewhere."""
    try:
        rows = json.loads(content)["rows"]
        old = None if rows is None else {file["path"]: file["sha256"] for file in rows["files"]}
    except (ValueError, KeyError, TypeError):  # it is no report
        return False
    new = None if report.rows is None else {file.path: file.sha256 for file in report.rows.files}
    if old is None or new is None:
        return old is not new
    return not old.keys() & new.keys() and list(old.values()) != list(new.values())


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def write(report: EvalReport, path: str) -> None:
    """Write the report to a path or URL: beside its place, then renamed."""
    folder, _, name = path.rpartition("/")
    RunDir(folder or ("/" if path.startswith("/") else ".")).write_text(name, text_of(report))


def text_of(report: EvalReport) -> str:
    """The report as it is written to files."""
    return json.dumps(report.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"


def _share(value: float | None, part: int, whole: int) -> str:
    return f"nothing of {whole}" if value is None else f"{value:.1%}, {part:,} of {whole:,}"
