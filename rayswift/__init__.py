"""RaySwift: one Ray cluster as a fine-tuning service. The public names, loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayswift.api import export, plan, run
    from rayswift.config.job import Job
    from rayswift.serving.app import build_app

__version__ = "0.1.0"
__all__ = ["Job", "build_app", "export", "plan", "run"]

_HOMES = {
    "Job": "rayswift.config.job",
    "run": "rayswift.api",
    "plan": "rayswift.api",
    "export": "rayswift.api",
    "build_app": "rayswift.serving.app",
}


def __getattr__(name: str) -> Any:
    """The public name, imported on first use so that `import rayswift` loads neither torch nor ray."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rayswift' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
