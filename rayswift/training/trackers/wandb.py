"""Weights & Biases (`pip install rayswift[wandb]`)."""

from __future__ import annotations

from typing import Any


class Wandb:
    """A wandb run of the same name, resumed when the run is."""

    def start(self, project: str, name: str, job: dict[str, Any]) -> None:
        """See `Tracker`."""
        import wandb

        self._run = wandb.init(project=project, name=name, id=name, resume="allow", config=job)

    def log(self, record: dict[str, Any]) -> None:
        """See `Tracker`."""
        self._run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()
