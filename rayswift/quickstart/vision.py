"""The vision quickstart: a small vision-language model learns to read handwritten digits, is served, and is asked.

Reads like what a user would type; every step is the same call that a command makes. Ray is started once.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift import api
from rayswift.progress import Progress, open_progress
from rayswift.quickstart.ask import Question, ask
from rayswift.quickstart.digits import QUESTION, Digit, Digits, write_digits
from rayswift.quickstart.result import Answer, VisionResult
from rayswift.quickstart.steps import command, free_port, timed, train, write_job

if TYPE_CHECKING:
    from rayswift.export.manifest import ExportManifest
    from rayswift.training.report import RunReport

MODEL_NAME, BASE_NAME = "digits", "untrained"
MAX_LENGTH = 256
_MAX_TOKENS = 4


def run(folder: Path) -> VisionResult:
    """The result of the whole pipeline, everything lying below the empty `folder`."""
    from rayswift.cluster.session import session
    from rayswift.models.init_vision import init_vision_model

    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        progress = open_progress()
        stack.callback(progress.close)
        with timed(seconds, "base model"):
            progress.phase("writing pictures of digits and a base model with random weights")
            digits = write_digits(folder / "data")
            made = init_vision_model(folder / "models" / "base", train_tokenizer_files=[digits.text])
            _write_job(folder, digits)
        with timed(seconds, "start Ray"):
            progress.phase("starting Ray")
            stack.enter_context(session(None))
        with timed(seconds, "train"):
            report = train(folder / "vision.yaml", progress)
        with timed(seconds, "export"):
            progress.phase("exporting, reloading and comparing")
            manifest = api.export(report.run_dir, str(folder / "exports" / MODEL_NAME), engine="local")
        with timed(seconds, "serve and ask"):
            progress.phase("serving")
            before, after = _serve_and_ask(folder, digits, progress)
    _show(digits.held_out, after)
    return _result(folder, digits, made.num_params, report, manifest, before, after, seconds)


def _write_job(folder: Path, digits: Digits) -> None:
    """Writes vision.yaml: an ordinary job file, to be run again with `rayswift train`."""
    job: dict[str, Any] = {
        "name": "vision", "output": str(folder / "runs"), "method": {"name": "sft"},
        "model": {"path": str(folder / "models" / "base")},
        "data": {"train": [{"path": str(digits.train)}], "eval": [{"path": str(digits.held_out_rows)}],
                 "max_length": MAX_LENGTH},
        "train": {"epochs": 12, "global_batch_size": 8, "micro_batch_size": 8, "lr": 2e-3, "betas": [0.9, 0.95],
                  "warmup_steps": 20, "save_every": None},
        "cluster": {"workers": 1},
    }  # fmt: skip
    write_job(folder / "vision.yaml", "Full fine-tuning of tower, projector and language model on pictures.", job)


def _serve_and_ask(folder: Path, digits: Digits, progress: Progress) -> tuple[tuple[Answer, ...], tuple[Answer, ...]]:
    """What the base and the trained model say of each held-out picture, both served by one endpoint."""
    from rayswift.serving.app import serve_in_background
    from rayswift.serving.spec import ServeSpec

    models = {BASE_NAME: str(folder / "models" / "base"), MODEL_NAME: str(folder / "exports" / MODEL_NAME)}
    questions = [Question(QUESTION, str(digit.label), digit.image) for digit in digits.held_out]
    handle = serve_in_background(ServeSpec(models=models, engine="local", port=free_port()))
    try:
        found = []
        for name in models:
            progress.phase(f"asking {name} about {len(questions)} held-out pictures at {handle.url}")
            found.append(ask(handle.url, name, questions, max_tokens=_MAX_TOKENS))
    finally:
        handle.close()
    return found[0], found[1]


def _show(digits: tuple[Digit, ...], answers: tuple[Answer, ...]) -> None:
    """Prints the first three answers of the served model, on stderr like all progress."""
    for digit, answer in zip(digits[:3], answers[:3], strict=True):
        print(f"\n[{digit.image.name}, a {digit.label}] {answer.question}\nA: {answer.answer}", file=sys.stderr)


def _result(
    folder: Path,
    digits: Digits,
    num_params: int,
    report: RunReport,
    manifest: ExportManifest,
    before: tuple[Answer, ...],
    after: tuple[Answer, ...],
    seconds: dict[str, float],
) -> VisionResult:
    place = f'"{folder}"' if " " in str(folder) else str(folder)
    return VisionResult(
        folder=str(folder),
        num_params=num_params,
        num_train_rows=digits.num_train,
        before=before,
        after=after,
        tokens_per_second=report.tokens_per_second or 0.0,
        curve=f"{report.run_dir}/curves.png",
        export_max_difference=None if manifest.verify is None else manifest.verify.logprobs.max_abs,
        seconds=seconds,
        next_commands=(
            f"{command()} serve {place}/exports/{MODEL_NAME} --port 8000",
            f"{command()} data inspect {place}/vision.yaml --rows 3",
            f"{command()} train {place}/vision.yaml name=longer train.epochs=30",
        ),
    )
