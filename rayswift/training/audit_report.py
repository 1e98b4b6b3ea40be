"""What an audit found: rows by source, and what does not add up."""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict

from rayswift.errors import DataError

_KEPT, _NAMED = 100, 5


@dataclass
class Problems:
    """What does not add up: how many things, and the first of them in words."""

    num: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """One more problem."""
        self.num += 1
        if len(self.shown) < _KEPT:
            self.shown.append(text)


class SourceRows(BaseModel):
    """What became of the rows of a source, counted over all epochs: a row of three epochs counts three times."""

    model_config = ConfigDict(frozen=True)

    path: str
    read: int
    """Trained on or quarantined."""
    trained: int
    truncated: int
    """Trained on without the tokens over `data.max_length`."""
    split: int
    """Trained on in several documents."""
    quarantined: int
    remaining: int


class AuditReport(BaseModel):
    """The rows of a run up to its newest checkpoint, at `step`. Sound when there are no problems."""

    model_config = ConfigDict(frozen=True)

    run_dir: str
    step: int
    finished: bool
    epochs: int
    sources: tuple[SourceRows, ...]
    problems: tuple[str, ...]
    """The first hundred things that do not add up, with their rows."""
    num_problems: int

    @property
    def total(self) -> SourceRows:
        """The sums over all sources."""
        names = ("read", "trained", "truncated", "split", "quarantined", "remaining")
        return SourceRows(path="all", **{name: sum(getattr(one, name) for one in self.sources) for name in names})

    def to_plain(self) -> dict[str, object]:
        """Plain data for `--json`."""
        return {**self.model_dump(mode="json"), "total": self.total.model_dump(exclude={"path"})}

    def summary(self) -> str:
        """A line for each source, their sum, and the verdict."""
        state = "finished" if self.finished else "not finished"
        lines = [f"{self.run_dir}: step {self.step}, {state}; rows of {self.epochs} epochs"]
        sources = self.sources if len(self.sources) == 1 else (*self.sources, self.total)
        lines += [
            f"  {one.path}: {one.read} read = {one.trained} trained on ({one.truncated} truncated, {one.split} split) "
            f"+ {one.quarantined} quarantined; {one.remaining} remaining"
            for one in sources
        ]
        if not self.num_problems:
            return "\n".join([*lines, "each row was trained on or quarantined as often as planned, by the record"])
        return "\n".join([*lines, *(f"  does not add up: {problem}" for problem in self.problems)])

    def check(self) -> None:
        """Raises DataError, which names the first rows, when something does not add up."""
        if self.num_problems:
            more = f"; and {self.num_problems - _NAMED} more" if self.num_problems > _NAMED else ""
            raise DataError(
                f"does not add up in {self.num_problems} places: {'; '.join(self.problems[:_NAMED])}{more}",
                path=self.run_dir,
            )
