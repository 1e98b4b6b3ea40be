"""What a quickstart reached, and how it is told. Figures only; knows nothing of how they came about."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rayswift.units import format_count, format_seconds

REQUIRED_SHARE = 0.8
"""Of the sampled trained questions, how many the served model must answer word for word."""
REQUIRED_ACCURACY = 0.9
"""Of the held-out pictures, how many the served model must read."""


@dataclass(frozen=True)
class Answer:
    """A question that was asked of the served model, and what came back."""

    question: str
    expected: str
    answer: str

    @property
    def exact(self) -> bool:
        """Whether it is the trained answer, word for word."""
        return self.answer.split() == self.expected.split()


@dataclass(frozen=True)
class QuickstartResult:
    """The figures of the closing report. Losses in nats per token, times in seconds."""

    folder: str
    num_params: int
    num_train_rows: int
    num_held_out_rows: int
    held_out_before: float
    held_out_after: float
    asked: tuple[Answer, ...]
    tokens_per_second: dict[str, float]
    curves: dict[str, str]
    export_max_difference: float | None
    seconds: dict[str, float]
    next_commands: tuple[str, ...]

    @property
    def num_exact(self) -> int:
        """How many answers were word for word."""
        return sum(answer.exact for answer in self.asked)

    @property
    def succeeded(self) -> bool:
        """Whether the promises were kept: held-out loss fell, and enough trained answers came back word for word."""
        return self.held_out_after < self.held_out_before and self.num_exact >= REQUIRED_SHARE * len(self.asked)

    def to_plain(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {**asdict(self), "num_exact": self.num_exact, "succeeded": self.succeeded}

    def summary(self) -> str:
        """The closing report."""
        speed = ", ".join(f"{name} {format_count(rate)}" for name, rate in self.tokens_per_second.items())
        exact = f"export     reloaded, log-probabilities within {self.export_max_difference:.1e} of the trained model"
        lines = [
            "",
            "held-out loss     before    after",
            f"                  {self.held_out_before:6.3f}   {self.held_out_after:6.3f}",
            f"  {self.num_held_out_rows} held-out rows ask about facts that were trained, in words that were not.",
            "",
            f"word for word     {self.num_exact} of {len(self.asked)} trained questions, asked of the served model",
            "",
            f"model      {format_count(self.num_params)} parameters, {self.num_train_rows} question/answer rows",
            *([exact] if self.export_max_difference is not None else []),
            f"tokens/s   {speed}",
            *(f"curves     {path}" for path in self.curves.values()),
            f"files      {self.folder}/ (data, models, runs, exports, job files)",
            f"time       {format_seconds(sum(self.seconds.values()))}: "
            + ", ".join(f"{name} {format_seconds(s)}" for name, s in self.seconds.items()),
            "",
            "try next",
            *(f"  {command}" for command in self.next_commands),
        ]
        if not self.succeeded:
            lines += ["", f"FAILED: held-out loss must fall and {REQUIRED_SHARE:.0%} of the answers must be exact."]
        return "\n".join(lines)


@dataclass(frozen=True)
class VisionResult:
    """The figures of the vision quickstart's report. `before`, `after`: what was said of each held-out picture."""

    folder: str
    num_params: int
    num_train_rows: int
    before: tuple[Answer, ...]
    after: tuple[Answer, ...]
    tokens_per_second: float
    curve: str
    export_max_difference: float | None
    seconds: dict[str, float]
    next_commands: tuple[str, ...]

    @property
    def accuracy_before(self) -> float:
        """The share of pictures that the untrained model read."""
        return sum(answer.exact for answer in self.before) / len(self.before)

    @property
    def accuracy_after(self) -> float:
        """The share of pictures that the trained, exported and served model read."""
        return sum(answer.exact for answer in self.after) / len(self.after)

    @property
    def succeeded(self) -> bool:
        """Whether the promise was kept."""
        return self.accuracy_before < REQUIRED_ACCURACY <= self.accuracy_after

    def to_plain(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        reached = {"accuracy_before": self.accuracy_before, "accuracy_after": self.accuracy_after}
        return {**asdict(self), **reached, "succeeded": self.succeeded}

    def summary(self) -> str:
        """The closing report."""
        exact = f"export     reloaded, log-probabilities within {self.export_max_difference:.1e} of the trained model"
        lines = [
            "",
            "held-out accuracy  before    after",
            f"                   {self.accuracy_before:6.1%}   {self.accuracy_after:6.1%}",
            f"  {len(self.after)} pictures that were not trained on, sent to the served models as data URIs.",
            "",
            f"model      {format_count(self.num_params)} parameters (tower, projector, language model), "
            f"{self.num_train_rows} pictures",
            *([exact] if self.export_max_difference is not None else []),
            f"tokens/s   {format_count(self.tokens_per_second)}",
            f"curve      {self.curve}",
            f"files      {self.folder}/ (data, models, runs, exports, vision.yaml)",
            f"time       {format_seconds(sum(self.seconds.values()))}: "
            + ", ".join(f"{name} {format_seconds(s)}" for name, s in self.seconds.items()),
            "",
            "try next",
            *(f"  {command}" for command in self.next_commands),
        ]
        if not self.succeeded:
            lines += ["", f"FAILED: at least {REQUIRED_ACCURACY:.0%} of the held-out pictures must be read."]
        return "\n".join(lines)
