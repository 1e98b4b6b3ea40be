"""The text quickstart: make a base, pretrain it, fine-tune it, export it, serve it, ask it.

Reads like what a user would type; every step is the same call that a command makes. Ray is started once.
"""

from __future__ import annotations

import random
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift import api
from rayswift.progress import Progress, open_progress
from rayswift.quickstart.ask import Question, ask
from rayswift.quickstart.corpus import Corpus, Fact, write_corpus
from rayswift.quickstart.result import Answer, QuickstartResult
from rayswift.quickstart.steps import command, free_port, timed, train, write_job

if TYPE_CHECKING:
    from rayswift.export.manifest import ExportManifest
    from rayswift.training.report import RunReport

NUM_ASKED = 48
SHOWN = ("str.upper", "len", "math.sqrt")
MODEL_NAME = "assistant"
MAX_LENGTH = 256
_SHAPE: dict[str, Any] = {
    "arch": "qwen3",
    "layers": 4,
    "hidden_size": 128,
    "heads": 4,
    "kv_heads": 2,
    "vocab_size": 4096,
}


def run(folder: Path) -> QuickstartResult:
    """The result of the whole pipeline, everything lying below the empty `folder`."""
    from rayswift.cluster.session import session
    from rayswift.models.init import init_model

    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        progress = open_progress()
        stack.callback(progress.close)
        with timed(seconds, "base model"):
            progress.phase("writing the corpus and a base model with random weights")
            corpus = write_corpus(folder / "data")
            made = init_model(folder / "models" / "base", **_SHAPE, train_tokenizer_files=[corpus.text], seed=0)
            write_jobs(folder, corpus)
        with timed(seconds, "start Ray"):
            progress.phase("starting Ray")
            stack.enter_context(session(None))
        with timed(seconds, "pretrain"):
            pretrained = train(folder / "pretrain.yaml", progress)
            api.export(pretrained.run_dir, str(folder / "models" / "pretrained"), engine="none")
        with timed(seconds, "fine-tune"):
            tuned = train(folder / "sft.yaml", progress)
        with timed(seconds, "export"):
            progress.phase("exporting, reloading and comparing")
            manifest = api.export(tuned.run_dir, str(folder / "exports" / MODEL_NAME), engine="local")
        with timed(seconds, "serve and ask"):
            progress.phase("serving")
            asked = _serve_and_ask(folder / "exports" / MODEL_NAME, corpus, progress)
    _show(asked)
    return _result(folder, corpus, made.num_params, (pretrained, tuned), manifest, asked, seconds)


def write_jobs(folder: Path, corpus: Corpus) -> None:
    """Writes pretrain.yaml and sft.yaml: ordinary job files, to be run again with `rayswift train`."""
    common: dict[str, Any] = {"output": str(folder / "runs")}
    cluster = {"workers": 1}
    write_job(folder / "pretrain.yaml", "Next-token training on the text of pydoc.", {
        "name": "pretrain", **common, "method": {"name": "pretrain"},
        "model": {"path": str(folder / "models" / "base")},
        "data": {"train": [{"path": str(corpus.text)}], "max_length": MAX_LENGTH},
        "train": {"max_steps": 60, "epochs": 2, "global_batch_size": 8, "micro_batch_size": 8, "lr": 3e-3,
                  "warmup_steps": 10, "save_every": None},
        "cluster": cluster,
    })  # fmt: skip
    write_job(folder / "sft.yaml", "Full fine-tuning on questions about Python; the loss is taken on answers only.", {
        "name": "sft", **common, "method": {"name": "sft"}, "model": {"path": str(folder / "models" / "pretrained")},
        "data": {"train": [{"path": str(corpus.train)}], "eval": [{"path": str(corpus.held_out)}],
                 "max_length": MAX_LENGTH},
        "train": {"epochs": 28, "global_batch_size": 2, "micro_batch_size": 2, "lr": 2e-3, "betas": [0.9, 0.95],
                  "warmup_steps": 20, "save_every": None},
        "cluster": cluster,
    })  # fmt: skip


def _serve_and_ask(export: Path, corpus: Corpus, progress: Progress) -> tuple[Answer, ...]:
    """The served model's answers to the shown and the sampled trained questions."""
    from rayswift.serving.app import serve_in_background
    from rayswift.serving.spec import ServeSpec

    handle = serve_in_background(ServeSpec(models={MODEL_NAME: str(export)}, engine="local", port=free_port()))
    try:
        progress.phase(f"asking {NUM_ASKED} trained questions at {handle.url}")
        return ask(handle.url, MODEL_NAME, [Question(fact.question, fact.answer) for fact in sample(corpus.facts)])
    finally:
        handle.close()


def sample(facts: tuple[Fact, ...]) -> tuple[Fact, ...]:
    """The facts that are asked: those shown first, then a seeded sample of the others."""
    shown = [fact for fact in facts if fact.name in SHOWN]
    others = [fact for fact in facts if fact.name not in SHOWN]
    return (*shown, *random.Random(1).sample(others, NUM_ASKED - len(shown)))


def _show(asked: tuple[Answer, ...]) -> None:
    """Prints the first three questions with the answers of the served model, on stderr like all progress."""
    for answer in asked[:3]:
        print(f"\nQ: {answer.question}\nA: {answer.answer}", file=sys.stderr)


def _result(
    folder: Path,
    corpus: Corpus,
    num_params: int,
    reports: tuple[RunReport, RunReport],
    manifest: ExportManifest,
    asked: tuple[Answer, ...],
    seconds: dict[str, float],
) -> QuickstartResult:
    _, tuned = reports
    return QuickstartResult(
        folder=str(folder),
        num_params=num_params,
        num_train_rows=corpus.num_train_rows,
        num_held_out_rows=corpus.num_held_out_rows,
        held_out_before=_measured(tuned.eval_loss_first),
        held_out_after=_measured(tuned.eval_loss_last),
        asked=asked,
        tokens_per_second={report.name: report.tokens_per_second or 0.0 for report in reports},
        curves={report.name: f"{report.run_dir}/curves.png" for report in reports},
        export_max_difference=None if manifest.verify is None else manifest.verify.logprobs.max_abs,
        seconds=seconds,
        next_commands=_next_commands(folder),
    )


def _measured(loss: float | None) -> float:
    return float("nan") if loss is None else loss


def _next_commands(folder: Path) -> tuple[str, ...]:
    """Three commands that work as printed, whether or not the environment is activated."""
    place = f'"{folder}"' if " " in str(folder) else str(folder)
    return (
        f"{command()} serve {place}/exports/{MODEL_NAME} --port 8000",
        f"{command()} data inspect {place}/sft.yaml",
        f"{command()} train {place}/sft.yaml name=longer train.epochs=60",
    )
