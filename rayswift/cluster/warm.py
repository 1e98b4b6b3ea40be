"""Hides start-up seconds: loads what is needed next while something else is waited for. Changes no result.

A run starts Ray, then Ray Train's controller, then a training worker and tasks that prepare rows; each of them
imports torch and transformers for seconds, one after the other. On this machine's own cluster the processes are
shared, so imports done early in one of them serve the worker that gets it.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from contextlib import suppress

import ray

_WORKER_MODULES = (
    "rayswift.cluster.worker",
    "rayswift.training.run",
    "rayswift.data.pipeline",
    "rayswift.models.loading",
)


def import_beside(*modules: str) -> threading.Thread:
    """A started thread that imports modules; whoever needs one of them imports it again and waits for the rest."""

    def load() -> None:
        for name in modules:
            importlib.import_module(name)

    thread = threading.Thread(target=load, name="import-beside", daemon=True)
    thread.start()
    return thread


def warm_worker(model_path: str) -> ray.ObjectRef[None]:
    """A reference to a task that loads what a training worker needs. Nobody has to wait for it."""
    load: Callable[[str], None] = _load_for_training
    return ray.remote(num_cpus=0.5)(load).remote(model_path)


def warm_data(model_path: str) -> ray.ObjectRef[None]:
    """A reference to a task that loads the tokenizer in a process that prepares rows afterwards."""
    load: Callable[[str], None] = _load_for_data
    return ray.remote(num_cpus=0.5)(load).remote(model_path)


def _load_for_training(model_path: str) -> None:
    for name in _WORKER_MODULES:
        importlib.import_module(name)
    with suppress(Exception):  # a model that cannot be built is reported where it is needed, not here
        from transformers import AutoModelForCausalLM

        from rayswift.models.loading import load_config

        AutoModelForCausalLM._model_mapping[type(load_config(model_path))]


def _load_for_data(model_path: str) -> None:
    from rayswift.data import pipeline

    pipeline._warm(model_path)
