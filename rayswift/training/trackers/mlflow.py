"""MLflow (`pip install rayswift[mlflow]`); the server is MLflow's own MLFLOW_TRACKING_URI."""

from __future__ import annotations

from typing import Any


class Mlflow:
    """An MLflow run of the same name."""

    def start(self, project: str, name: str, job: dict[str, Any]) -> None:
        """See `Tracker`."""
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(project)
        mlflow.start_run(run_name=name)
        mlflow.log_dict(job, "job.json")

    def log(self, record: dict[str, Any]) -> None:
        """See `Tracker`."""
        numbers = {k: float(v) for k, v in record.items() if k != "step" and isinstance(v, int | float)}
        self._mlflow.log_metrics(numbers, step=record["step"])

    def close(self) -> None:
        """See `Tracker`."""
        self._mlflow.end_run()
