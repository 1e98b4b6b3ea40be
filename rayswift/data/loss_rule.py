"""Which turns of a conversation are trained, and what the parts of an answer count.

`data.loss` names the turns and chains tables of `weighting/`; `data.loss_weights` is one more table, the user's own.
A weight that a row gives a message is multiplied with the factors of its parts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, cast

import numpy as np

from rayswift import plugins
from rayswift.config.job import DataSpec
from rayswift.data.weighting import Factors
from rayswift.errors import ConfigError

Turns = Literal["default", "last_round", "all"]
_TURNS = ("default", "last_round", "all")
_Table = tuple[tuple[str, tuple[float, ...]], ...]
_Span = tuple[int, int]


@dataclass(frozen=True)
class LossRule:
    """`turns` that are trained unless a row says otherwise; `tables` whose factors apply inside answers."""

    turns: Turns = "default"
    tables: tuple[_Table, ...] = ()

    def factors(self, answer: str, end: int) -> np.ndarray | None:
        """What each character of an answer counts, float64 [len(answer)]; None where all count 1.

        From `end` on is what ends the turn, which no table reaches: a model that is not taught to stop does not.
        """
        if not self.tables:
            return None
        factors = np.ones(len(answer))
        for table in self.tables:
            for start, stop, factor in _matches(answer[:end], table):
                factors[start:stop] *= factor
        return factors


def rule_of(data: DataSpec, *, everything: bool) -> LossRule:
    """The rule of a job's data. `everything`: for a method that trains every token, and so has no use for another.

    Errors as `loss_rule`, and ConfigError for such a method with a rule that it would not follow.
    """
    rule = loss_rule(data.loss, data.loss_weights)
    if everything and (rule.tables or rule.turns == "last_round"):
        key, value = ("data.loss_weights", data.loss_weights) if data.loss in _TURNS else ("data.loss", data.loss)
        key, value = ("data.loss", data.loss) if rule.turns == "last_round" else (key, value)
        raise ConfigError(
            "is not followed by this method, which trains every token", path=key, value=value,
            fix="leave it out, or use method.name=sft",
        )  # fmt: skip
    return rule


def loss_rule(chain: str, weights: Mapping[str, Factors], *, path: str = "data") -> LossRule:
    """The rule of `last_round+ignore_empty_think+hermes` and a user's table.

    Raises ConfigError for a name nobody defines, turns that are not named first, and a pattern that is none.
    """
    names = [name.strip() for name in chain.split("+")]
    turns = cast(Turns, names.pop(0)) if names[0] in _TURNS else "default"
    for name in names:
        _check_known(name, f"{path}.loss")
        if name in _TURNS:
            raise ConfigError(
                f"has {name} behind another name; what turns are trained comes first",
                path=f"{path}.loss", value=chain, fix=f"use {name}+{'+'.join(n for n in names if n not in _TURNS)}"
            )  # fmt: skip
    tables = [_plain(_named(name, f"{path}.loss")) for name in names]
    for pattern in weights:
        try:
            _compiled(pattern)
        except re.error as error:
            raise ConfigError(
                f"is no regular expression: {error}", path=f"{path}.loss_weights", value=pattern,
                fix="write a backslash before each of . * + ? ( ) [ ] { } | ^ $ that is meant as itself",
            ) from error  # fmt: skip
    return LossRule(turns, (*tables, *([_plain(weights)] if weights else [])))


def _check_known(name: str, path: str) -> None:
    known = (*_TURNS, *plugins.names("data.weighting"))
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"use {', '.join(known)}, chained with +"
        raise ConfigError("is neither a choice of turns nor one of data.weighting", path=path, value=name, fix=hint)


def _named(name: str, path: str) -> Mapping[str, Factors]:
    return cast(Mapping[str, Factors], plugins.load("data.weighting", name, path=path).table)


def _plain(table: Mapping[str, Factors]) -> _Table:
    """Tuples, because a plan is hashed and travels."""
    return tuple(
        (pattern, (float(factors),) if isinstance(factors, int | float) else tuple(map(float, factors)))
        for pattern, factors in table.items()
    )


def _matches(text: str, table: _Table) -> Iterator[tuple[int, int, float]]:
    """[start, stop) and factor of all that the table reaches, in order and apart: first match first, then longest."""
    following: float | None = None
    position = 0
    waiting = [_Waiting(pattern, factors) for pattern, factors in table]
    while found := [one for one in waiting if one.seek(text, position)]:
        first = min(found, key=lambda one: (one.span[0], -one.span[1]))
        start, stop = first.span
        if following is not None:
            yield position, start, following
        yield start, stop, first.factors[0]
        following = first.factors[1] if len(first.factors) == 2 else following
        position = stop
    if following is not None:
        yield position, len(text), following


@dataclass
class _Waiting:
    """A pattern and its next match, which is looked for again only once the place before it is taken."""

    pattern: str
    factors: tuple[float, ...]
    span: _Span = (-1, -1)
    gone: bool = False

    def seek(self, text: str, position: int) -> bool:
        """Whether it matches at or behind `position`; a match of nothing does not count."""
        if not self.gone and self.span[0] < position:
            found = (match.span() for match in _compiled(self.pattern).finditer(text, position))
            span = next((span for span in found if span[0] < span[1]), None)
            self.gone, self.span = span is None, span or self.span
        return not self.gone


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.DOTALL)
