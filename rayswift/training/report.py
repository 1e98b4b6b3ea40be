"""The closing report of a run: report.json, report.md and curves.png, all drawn from metrics.jsonl."""

from __future__ import annotations

from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict

from rayswift.training.run_dir import METRICS, RunDir
from rayswift.units import format_bytes, format_count, format_seconds


class RunReport(BaseModel):
    """What a run did. Losses are None when nothing was trained or held out; sizes in bytes, times in seconds."""

    model_config = ConfigDict(frozen=True)

    name: str
    run_dir: str
    steps: int
    epochs: float
    final_loss: float | None
    eval_loss_first: float | None
    eval_loss_last: float | None
    tokens: int
    tokens_per_second: float | None
    """Median over the steps after the first three: the steady state."""
    rows_read: int
    rows_trained: int
    rows_quarantined: int
    restarts_survived: int
    resumed_from_step: int
    phases_s: dict[str, float]
    wall_s: float
    planned_memory_bytes: int
    peak_memory_bytes: int
    checkpoint: str
    steps_skipped: int = 0
    """Steps whose gradients were not finite: counted, never applied."""

    def summary(self) -> str:
        """The report as a Markdown page."""
        skipped = f", {self.steps_skipped} skipped" if self.steps_skipped else ""
        rows = [
            ("steps", f"{self.steps} ({self.epochs:.2f} epochs){skipped}"),
            ("loss", _number(self.final_loss)),
            ("held-out loss", f"{_number(self.eval_loss_first)} before, {_number(self.eval_loss_last)} after"),
            ("tokens", f"{format_count(self.tokens)}, {format_count(self.tokens_per_second or 0)} per second"),
            (
                "rows",
                f"{self.rows_read} read, {self.rows_trained} trained on, {self.rows_quarantined} quarantined",
            ),
            ("restarts survived", str(self.restarts_survived)),
            ("time", f"{format_seconds(self.wall_s)}: {_phases(self.phases_s)}"),
            (
                "memory per worker",
                f"{format_bytes(self.peak_memory_bytes)} at peak, {format_bytes(self.planned_memory_bytes)} planned",
            ),
            ("checkpoint", self.checkpoint),
        ]
        lines = [f"# Run {self.name}", "", "| | |", "|---|---|"]
        return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows), "", "![loss](curves.png)", ""])


def steady_tokens_per_second(records: list[dict[str, Any]]) -> float | None:
    """The median tokens per second after three warm-up steps; of all steps when there are no more."""
    rates = [r["tokens_per_second"] for r in records if "tokens_per_second" in r]
    return median(rates[3:] or rates) if rates else None


def losses(records: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of each record that has the key."""
    return [(r["step"], r[key]) for r in records if r.get(key) is not None]


def write_report(report: RunReport) -> None:
    """Write report.json, report.md and curves.png into the run directory."""
    run_dir = RunDir(report.run_dir)
    run_dir.write_text("report.json", report.model_dump_json(indent=1) + "\n")
    run_dir.write_text("report.md", report.summary())
    draw_curves(run_dir)


def draw_curves(run_dir: RunDir) -> None:
    """Write curves.png: training and held-out loss, gradient norm and learning rate over steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = run_dir.read_jsonl(METRICS)
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, norm_axes, rate_axes = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1, 1])
    for axes, key, label in (
        (loss_axes, "loss", "training"),
        (loss_axes, "eval_loss", "held out"),
        (norm_axes, "grad_norm", "gradient norm"),
        (rate_axes, "lr", "learning rate"),
    ):
        points = losses(records, key)
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 25 else "", markersize=3)
    loss_axes.set_ylabel("loss (nats per token)")
    norm_axes.set_ylabel("grad norm")
    rate_axes.set_ylabel("lr")
    rate_axes.set_xlabel("optimizer step")
    if loss_axes.lines:
        loss_axes.legend()
    loss_axes.set_title(run_dir.url.rsplit("/", 1)[-1])
    for axes in (loss_axes, norm_axes, rate_axes):
        axes.grid(alpha=0.3)
    with run_dir.fs.open(run_dir.path("curves.png"), "wb") as stream:
        figure.savefig(stream, format="png", dpi=120)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _phases(phases_s: dict[str, float]) -> str:
    return ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in phases_s.items())
