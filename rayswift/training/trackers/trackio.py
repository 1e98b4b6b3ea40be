"""trackio (`pip install rayswift[trackio]`): local-first tracking with wandb's calls."""

from __future__ import annotations

from typing import Any


class Trackio:
    """A trackio run of the same name."""

    def start(self, project: str, name: str, job: dict[str, Any]) -> None:
        """See `Tracker`."""
        import trackio

        self._trackio = trackio
        trackio.init(project=project, name=name, config=job, resume="allow")

    def log(self, record: dict[str, Any]) -> None:
        """See `Tracker`."""
        self._trackio.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def close(self) -> None:
        """See `Tracker`."""
        self._trackio.finish()
