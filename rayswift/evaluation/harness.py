"""Tasks of the lm-evaluation-harness: found by name, loaded with their data, asked of a model, and reported.

Knows the harness' tasks and results; `harness_models.py` knows how a model or an endpoint becomes one of the harness'.
The harness is an extra, imported only where tasks were asked for.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from rayswift.errors import ConfigError, RaySwiftError
from rayswift.evaluation.report import HarnessReport, TaskResult, TaskScore

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

_OPTION, _GENERATES = "--tasks", "generate_until"
_DEFAULT = "using default"  # what a task does not say and need not
_LOGGER, _REQUESTS = "lm_eval", "lm_eval.models.api_models"
_STDERR, _FOUND_CHARS, _SHOWN = "_stderr", 300, 10
_RANDOM_SEED, _OTHER_SEED = 0, 1234  # the harness' own, with which published figures are made


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks, their data at hand. `asked` are the names given, of tasks, groups or tags; `notes` were told."""

    asked: tuple[str, ...]
    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]
    notes: tuple[str, ...]


def open_tasks(asked: Sequence[str], *, num_fewshot: int | None = None, include_path: str | None = None) -> Tasks:
    """The tasks of these names, each with `num_fewshot` examples, or as many as it sets itself.

    A task of `include_path` comes before one of the harness' own of the same name. Raises ConfigError where the harness
    is not installed, a name is unknown, or a task or its data cannot be loaded or would run what a model writes.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("needs the lm-evaluation-harness, which is not installed", path=_OPTION,
                          value=",".join(asked), fix="pip install 'rayswift[harness]'")  # fmt: skip
    if include_path is not None and not os.path.isdir(include_path):
        raise ConfigError("is not a folder", path="--include-path", value=include_path,
                          fix="name the folder with the YAML files of your tasks")  # fmt: skip
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    with heard() as notes:
        manager = _manager(asked, include_path)
        for name in asked:
            loaded = _loaded(manager, name)
            if twice := tasks.keys() & loaded["tasks"].keys():
                raise ConfigError(f"has {min(twice)} twice", path=_OPTION, value=",".join(asked), fix=f"leave {name} "
                                  "out, or name the parts of it that are meant")  # fmt: skip
            tasks |= loaded["tasks"]
            groups |= loaded.get("groups", {})
        for name, task in tasks.items():
            _check_kind(name, task)
            notes += _set_fewshot(name, task, num_fewshot)
    return Tasks(tuple(asked), tasks, groups, tuple(notes))


def check_generates(tasks: Tasks, target: str) -> None:
    """Raises ConfigError for a task that needs log-probabilities of prompts, which an endpoint does not give."""
    if wrong := [name for name, task in tasks.tasks.items() if task.OUTPUT_TYPE != _GENERATES]:
        more = f" and {len(wrong) - _SHOWN} more" * (len(wrong) > _SHOWN)
        raise ConfigError(
            f"needs log-probabilities of prompts for {', '.join(wrong[:_SHOWN])}{more}, which the endpoint {target} "
            "does not give", path=_OPTION, value=",".join(tasks.asked),
            fix="evaluate the run or its export, or name tasks whose output_type is generate_until",
        )  # fmt: skip


def check_room(tasks: Tasks, max_length: int) -> None:
    """Raises ConfigError for a task whose answers leave no room for a prompt."""
    from lm_eval.models.utils import normalize_gen_kwargs

    for name, task in tasks.tasks.items():
        if task.OUTPUT_TYPE == _GENERATES:
            answer = normalize_gen_kwargs(task.config.generation_kwargs or {})["max_gen_toks"]
            if answer >= max_length:
                raise ConfigError(
                    f"asks for answers of {answer} tokens, and the model takes {max_length} with the prompt",
                    path=_OPTION, value=name, fix="set max_gen_toks in a YAML file of yours under --include-path",
                )  # fmt: skip


def measure(tasks: Tasks, lm: LM, *, limit: int | None, chat_template: bool) -> HarnessReport:
    """What the model is worth on the first `limit` samples of each task, by the task's own metrics.

    The seeds, the fewshot examples as turns of a chat, and the standard errors are the harness' defaults.
    """
    import numpy as np
    import torch
    from lm_eval.evaluator import evaluate

    random.seed(_RANDOM_SEED)
    np.random.seed(_OTHER_SEED)
    torch.manual_seed(_OTHER_SEED)
    with heard() as notes:
        found = evaluate(
            lm, {"tasks": dict(tasks.tasks), "groups": dict(tasks.groups)}, limit=limit,
            apply_chat_template=chat_template, fewshot_as_multiturn=chat_template,
        )  # fmt: skip
    assert found is not None, "one process is the first one"
    told = list(dict.fromkeys([*tasks.notes, *notes]))
    more = [f"and {len(told) - _SHOWN} more warnings"] if len(told) > _SHOWN else []
    return HarnessReport(
        version=version("lm_eval"),
        chat_template=chat_template,
        tasks=tuple(_result(name, found, tasks) for name in found["results"]),
        notes=(*told[:_SHOWN], *more),
    )


@contextmanager
def blamed() -> Iterator[None]:
    """Makes what the functions of a task raise while a model of this machine is measured an error that says so."""
    import torch

    try:
        yield
    except RaySwiftError:
        raise
    except torch.OutOfMemoryError as error:
        raise RaySwiftError("does not fit into the device's memory", path="--batch-size", fix="lower it") from error
    except Exception as error:
        raise RaySwiftError(
            f"fail: {_said(error)}", path=_OPTION,
            fix="see with RAYSWIFT_DEBUG=1 which function of which task it is, and mend or leave out the task",
        ) from error  # fmt: skip


@contextmanager
def heard() -> Iterator[list[str]]:
    """Keeps what the harness warns of as notes, a line each, instead of printing it. An error has them with it.

    Keys of endpoints are not among them.
    """
    notes: list[str] = []
    handler, logger = _Notes(notes), logging.getLogger(_LOGGER)
    before = (logger.propagate, list(logger.handlers))
    logger.propagate, logger.handlers = False, [handler]
    try:
        yield notes
    except Exception as error:
        for note in notes:
            error.add_note(note)
        raise
    finally:
        logger.propagate, logger.handlers = before


class _Notes(logging.Handler):
    """Appends each message once. What a failed request is told with is left out: it is raised too, and has the key."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        from rayswift.serving.client import printable

        text = printable(" ".join(record.getMessage().split()))[:_FOUND_CHARS]
        is_default = _DEFAULT in text
        is_request = record.name == _REQUESTS and record.levelno > logging.WARNING
        if not is_default and not is_request and text not in self._notes:
            self._notes.append(text)


def _manager(asked: Sequence[str], include_path: str | None) -> TaskManager:
    """An index with every name asked for. The harness' own tasks take a quarter of a minute to index."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        own = TaskManager(include_path=include_path, include_defaults=False)
        if all(_is_whole(own, name) for name in asked):
            return own
    manager = TaskManager(include_path=include_path)
    known = set(manager.all_tasks)
    for name in asked:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            raise ConfigError(
                "is no task of the lm-evaluation-harness" + (f" or of {include_path}" if include_path else ""),
                path=_OPTION, value=name,
                fix=f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists them",
            )  # fmt: skip
    return manager


def _is_whole(manager: TaskManager, name: str) -> bool:
    """Whether the index has the name, and of a group every member."""
    entry = manager.task_index.get(name)
    if entry is None or name not in manager.all_groups:
        return entry is not None
    members = (one if isinstance(one, str) else one.get("task") for one in entry.cfg["task"])
    return all(isinstance(one, str) and _is_whole(manager, one) for one in members)


def _loaded(manager: TaskManager, name: str) -> dict[str, Any]:
    """The tasks and groups of a name. What a task's file, its functions or its data raise is told as it is."""
    try:
        return dict(manager.load([name]))
    except Exception as error:
        raise ConfigError(
            f"cannot be loaded: {_said(error)}", path=_OPTION, value=name,
            fix="see that its data can be reached from here, or name local data_files in a YAML file of yours under "
            "--include-path",
        ) from error  # fmt: skip


def _check_kind(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError("runs code that the model writes, on this machine", path=_OPTION, value=name,
                          fix="run it with lm-eval on the export, in a sandbox")  # fmt: skip
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError("asks about media, and is asked about text only", path=_OPTION, value=name,
                          fix="leave it out, or give the questions as --rows")  # fmt: skip


def _set_fewshot(name: str, task: Any, asked: int | None) -> Iterator[str]:
    """Sets the number of examples as the harness does: a task that sets 0 keeps it, which is told."""
    own = task.get_config("num_fewshot")
    if asked is not None and own == 0 and asked:
        yield f"{name} sets num_fewshot 0 itself and keeps it"
    elif asked is not None or own is None:
        task.set_config(key="num_fewshot", value=asked or 0)
    task.set_fewshot_seed(seed=_OTHER_SEED)


def _result(name: str, found: Mapping[str, Any], tasks: Tasks) -> TaskResult:
    """What the harness found out about a task or a group."""
    task, members = tasks.tasks.get(name), tuple(found["group_subtasks"].get(name, ()))
    figures = found["results"][name]
    count = found["n-samples"].get(name, {"effective": figures.get("sample_len", 0), "original": None})
    label, fewshot = found["versions"].get(name), found["n-shot"].get(name)
    better = found["higher_is_better"].get(name, {})
    return TaskResult(
        name=name,
        members=members,
        version=None if label is None else str(label),
        output_type=task.OUTPUT_TYPE if task is not None else None,
        num_fewshot=fewshot if isinstance(fewshot, int) else None,
        num_samples=count["effective"],
        num_available=count["original"],
        sha256=_identity(found["samples"][name]) if task is not None else None,
        scores=tuple(
            TaskScore(
                metric=metric, filter=kept, value=_number(value),
                stderr=_number(figures.get(f"{metric}{_STDERR},{kept}")), higher_is_better=better.get(metric),
            )
            for metric, kept, value in _scores(figures)
        ),
    )  # fmt: skip


def _scores(figures: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(metric, filter of the answers, value) of the figures whose key is `metric,filter`."""
    for key, value in figures.items():
        metric, comma, kept = key.partition(",")
        if comma and not metric.endswith(_STDERR):
            yield metric, kept, value


def _identity(samples: Sequence[Mapping[str, Any]]) -> str:
    """sha256 of the documents, prompts and expected answers, as the harness' own `task_hashes`."""
    from lm_eval.utils import hash_string

    return str(hash_string("".join(one["doc_hash"] + one["prompt_hash"] + one["target_hash"] for one in samples)))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:_FOUND_CHARS]}"


def _number(value: Any) -> float | None:
    """A figure that JSON can hold; the harness writes "N/A" where there is none."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
