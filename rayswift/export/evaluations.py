"""What reports of `rayswift eval` say, for the manifest and the card: of the step exported, or of an export itself.

Knows where those of a run lie and what of them is told on; measures nothing. How one comes into the folder of an export
is known by `export/kept.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from rayswift.evaluation.report import HarnessReport
from rayswift.export.manifest import Evaluation
from rayswift.training.run_dir import RunDir

_PREFIX, _SUFFIX = "eval-", ".json"


def evaluations_of(run: RunDir | None, step: int | None) -> tuple[Evaluation, ...]:
    """The reports beside the run that are of this step, by name. What is no report is passed over, with a warning."""
    return tuple(_found(run, step)) if run is not None else ()


def _found(run: RunDir, step: int | None) -> Iterator[Evaluation]:
    for name in sorted(run.names("")):
        if not (name.startswith(_PREFIX) and name.endswith(_SUFFIX)):
            continue
        try:
            report = json.loads(run.read_text(name))
            if report["target"].get("step") == step:
                yield evaluation(name, report)
        except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
            reason = " ".join(str(error).split())[:200]
            print(f"warning: passed over {run.path(name)}, which is no report: {reason}", file=sys.stderr)


def evaluation(name: str, report: Mapping[str, Any], sha256: str | None = None) -> Evaluation:
    """What a report says; `sha256` is that of one in the folder of the export that it is of.

    Raises what plain data raises that is no report: KeyError, TypeError, AttributeError, ValidationError.
    """
    rows, answers = report.get("rows") or {}, report.get("answers") or {}
    harness = report.get("harness")
    return Evaluation(
        report=name,
        of="run" if sha256 is None else "export",
        sha256=sha256,
        rows={file["path"]: file.get("sha256") for file in rows.get("files", ())},
        num_rows=rows.get("used", 0),
        loss=report.get("loss"),
        perplexity=report.get("perplexity"),
        exact_match=answers.get("exact_match"),
        num_answered=answers.get("num_answered"),
        accuracy=answers.get("accuracy"),
        num_judged=answers.get("num_judged"),
        harness=None if harness is None else HarnessReport.model_validate(harness),
    )
