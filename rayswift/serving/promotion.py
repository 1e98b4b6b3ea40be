"""When a new version of a model may take more of the traffic, and when it has to give it back: pure decisions.

Knows counts and answers. Who shifts the traffic, and how, is known by `serving/rollout.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np

from rayswift.errors import ConfigError
from rayswift.serving.tallies import Tally, longer_than, quantile_s

_FLOOR_S = 0.05
"""Latencies that differ by less than this are the same."""
_WAIT_RATIO = 2.0
"""How much longer than the live version took at most is no hang yet: prompts differ in length."""
_ANSWER_RATIO, _LEAST_ANSWER_S = 4.0, 60.0
"""The same of whole answers, which differ in length too, and what any may take: a first one may warm its engine up."""

_LEFT_MARGIN, _NOISE = 0.2, 4.0
"""How many more answers may be abandoned, as a fraction and in standard errors, for it is looked at all the time."""


@dataclass(frozen=True)
class Window:
    """What was seen since a step began: of the candidate in it, of the live version since the promotion began."""

    elapsed_s: float
    candidate: Tally
    live: Tally
    live_before: Tally = field(default_factory=Tally)
    """Of the live version until then: what its latencies are where it has had little traffic beside the candidate."""
    beside: Tally = field(default_factory=Tally)
    """Of the live version since this step began."""


@dataclass(frozen=True)
class Hold:
    """Nothing is known yet. `needs_requests`: time alone will not tell, for there is too little traffic."""

    needs_requests: bool = False


@dataclass(frozen=True)
class Advance:
    """The step has passed. `unjudged` says what could not be looked at, and why; mostly empty."""

    unjudged: str = ""


@dataclass(frozen=True)
class RollBack:
    """The candidate is worse than allowed."""

    reason: str


@dataclass(frozen=True)
class Policy:
    """What a candidate has to keep to in every step of a promotion."""

    steps: tuple[float, ...] = (0.05, 0.25, 0.5, 1.0)
    """Its share of the traffic, step by step; the last is 1."""
    step_s: float = 60.0
    min_requests: int = 20
    """Answers of the candidate without which no step passes; 0 lets time and the verification prompts decide."""
    max_wait_s: float = 900.0
    """How long a step waits for those answers before the candidate goes back."""
    max_error_rate: float = 0.01
    """Fraction of its answers that may fail; where more of the live version's do, as many of its own, and the noise.

    Beside a live version that fails 5%, an equal one goes back once in a hundred steps; one that fails 15%, in a third
    of those with 40 answers of its own, and in all with 1000."""
    max_latency_ratio: float = 1.5
    """Of its 50th and 95th percentiles, to the first token and to the last, to those of the live version."""
    max_answer_loss: float = 0.02
    """How much lower its fraction of right answers may be than the live version's."""
    min_agreement: float = 0.0
    """Least fraction of the live version's greedy answers that it has to give too."""
    max_token_wait_s: float = 30.0
    """How long an answer may wait for its next token; one that waits longer has failed.

    Where the live version takes as long to its first tokens, twice the longest of those."""
    min_similarity: float = 0.8
    """Least mean cosine of its vectors and the live version's, beside which clients have stored those.

    Quantizing costs a hundredth or so, more training a tenth; vectors of another model have nothing to do with them."""
    min_token_agreement: float = 0.1
    """Least fraction of tokens of the live version's answers that the candidate would choose too, behind those before.

    Asked where no right answers vouch for it (`Answers.vouch`), to find a broken version: whole answers of two good
    ones differ as soon as one token does. Of small models, noise, one token over and over, and layers in a wrong order
    choose at most 0.01 of them, a base that nobody tuned 0.05; of two tuned little and on other rows 0.16, by another
    seed 0.62, with a tenth of noise in its weights 0.94. A version that is to answer in another language or manner is
    taken for a broken one, and one that is wrong in the same words for a good one: rows with right answers tell."""

    def __post_init__(self) -> None:
        rising = all(0 < step <= 1 for step in self.steps) and list(self.steps) == sorted(set(self.steps))
        if not self.steps or not rising or self.steps[-1] != 1:
            raise ConfigError(
                "are not growing shares of which the last is 1", path="steps", value=",".join(map(str, self.steps)),
                fix="write --steps 0.05,0.25,0.5,1",
            )  # fmt: skip
        for name, value, least, most in (
            ("step_seconds", self.step_s, 0, inf), ("min_requests", self.min_requests, 0, inf),
            ("max_wait", self.max_wait_s, 0, inf), ("max_error_rate", self.max_error_rate, 0, 1),
            ("max_latency_ratio", self.max_latency_ratio, 1, inf), ("max_answer_loss", self.max_answer_loss, 0, 1),
            ("min_agreement", self.min_agreement, 0, 1), ("max_token_wait", self.max_token_wait_s, 0, inf),
            ("min_similarity", self.min_similarity, -1, 1),
            ("min_token_agreement", self.min_token_agreement, 0, 1),
        ):  # fmt: skip
            if not least <= value <= most:
                bounds = f"from {least} to {most}" if most < inf else f"of at least {least}"
                raise ConfigError("is out of bounds", path=name, value=value, fix=f"write a number {bounds}")

    def decide(self, window: Window) -> Hold | Advance | RollBack:
        """What to do now. Errors are acted on at once, latencies as soon as there are enough of both versions."""
        candidate, live = window.candidate, window.live
        failing = self._failing(window) or self._left(candidate, window.beside)
        if failing is not None:
            return failing
        enough, known = candidate.ended >= self.min_requests, live
        if live.answered < self.min_requests:
            known = live + window.live_before
        is_comparable = known.answered >= max(1, self.min_requests)
        if enough and is_comparable:
            slow = self._slower(candidate, known)
            if slow is not None:
                return slow
        if window.elapsed_s < self.step_s:
            return Hold()
        if enough:
            few = f"latency, for the live version has {known.answered} answers to compare with"
            return Advance("" if is_comparable else few)
        if window.elapsed_s < self.step_s + self.max_wait_s:
            return Hold(needs_requests=True)
        few = f"{candidate.ended} of {self.min_requests} answers in {window.elapsed_s:.0f} s"
        return RollBack(f"there was too little traffic to judge it by, {few}; lower --min-requests")

    def patience_s(self, live_s: float) -> float:
        """How long to wait for a token, where the live version took `live_s` to its first ones at most."""
        return max(self.max_token_wait_s, _WAIT_RATIO * live_s)

    def answer_patience_s(self, live_s: float) -> float:
        """How long to wait for a whole verification answer, where the live version took `live_s` at most."""
        return max(self.max_token_wait_s, _LEAST_ANSWER_S, _ANSWER_RATIO * live_s)

    def _failing(self, window: Window) -> RollBack | None:
        """Too many answers that failed, or that hang: of those nothing is heard before their time is out."""
        candidate, bound_s = window.candidate, self.patience_s(quantile_s(window.live.first, 1) or 0)
        hanging = longer_than(candidate.waits, bound_s)
        failed, ended = candidate.failed + hanging, candidate.ended + hanging
        judged, live = max(1, ended, self.min_requests), self._of_live(window)
        rate = min(1.0, max(0, live.failed) / max(1, live.ended))
        noise = (rate * (1 - rate) * (1 / judged + 1 / max(1, live.ended))) ** 0.5
        if failed <= max(self.max_error_rate, rate + _NOISE * noise) * judged:
            return None
        late = f", {candidate.late} of them by taking longer than request_timeout_s" if candidate.late else ""
        how = f", {hanging} of them by waiting more than {bound_s:.0f} s for a token" if hanging else ""
        beside = f", beside {rate:.1%} of the live version's" if rate else ""
        return RollBack(f"{failed} of its {ended} answers failed{late}{how}{beside}")

    def _of_live(self, window: Window) -> Tally:
        """What tells how often the live version fails: of this step or, where that is too little, of before it too."""
        enough = max(self.min_requests, 3 / (self.max_error_rate or 0.01))  # at the bound it has failed, 19 times of 20
        known = (window.beside, window.live, window.live + window.live_before)
        live = next((one for one in known if one.ended >= enough), known[-1])
        return live if live.ended >= self.min_requests else Tally()

    def _left(self, candidate: Tally, beside: Tally) -> RollBack | None:
        """Far more answers that their clients gave up than the live version has in the same time."""
        mine, theirs = candidate.started, beside.started
        if min(mine, theirs) < max(1, self.min_requests):
            return None
        both = min(1.0, (candidate.abandoned + beside.abandoned) / (mine + theirs))
        noise = (both * (1 - both) * (1 / mine + 1 / theirs)) ** 0.5
        new, old = candidate.abandoned / mine, beside.abandoned / theirs
        if new - old <= max(_LEFT_MARGIN, _NOISE * noise):
            return None
        return RollBack(
            f"{new:.0%} of its answers were abandoned before their end, beside {old:.0%} of the live version's"
        )

    def _slower(self, candidate: Tally, live: Tally) -> RollBack | None:
        pairs = (("first token", candidate.first, live.first), ("whole answer", candidate.whole, live.whole))
        for what, mine, theirs in pairs:
            for fraction in (0.5, 0.95):
                new, old = quantile_s(mine, fraction), quantile_s(theirs, fraction)
                if new is None or old is None or new - old < _FLOOR_S:
                    continue
                if new > self.max_latency_ratio * old:
                    return RollBack(f"p{fraction * 100:.0f} to the {what} is {new:.2f} s beside {old:.2f} s")
        return None


@dataclass(frozen=True)
class Answers:
    """How both versions answered the verification prompts; None for an answer that failed."""

    live: Sequence[str | None]
    candidate: Sequence[str | None]
    expected: Sequence[str] | None = None

    @property
    def agreement(self) -> float:
        """The fraction of the live version's answers that the candidate gives too."""
        given = [(a, b) for a, b in zip(self.live, self.candidate, strict=True) if a is not None]
        return sum(a == b for a, b in given) / len(given) if given else 1.0

    def vouch(self, policy: Policy) -> bool:
        """Whether the candidate's answers themselves say that it is not broken: some are the right ones, or all alike.

        More than may be lost, for else a version without any would pass beside the live one. None may be right of long
        answers, however good they are.
        """
        right = self.right(self.candidate) if self.expected else 0.0
        return right > policy.max_answer_loss

    def right(self, said: Sequence[str | None]) -> float:
        """The fraction of answers that are as expected, white space around them not counted."""
        assert self.expected
        pairs = zip(said, self.expected, strict=True)
        return sum(text is not None and text.strip() == wanted.strip() for text, wanted in pairs) / len(self.expected)


def judged(answers: Answers, policy: Policy, within_s: float) -> RollBack | None:
    """Why the candidate may not answer anybody; None where it may. Its answers were waited for `within_s`."""
    failed = sum(text is None for text in answers.candidate)
    if failed:
        many = len(answers.candidate)
        return RollBack(f"{failed} of {many} verification prompts were not answered within {within_s:.0f} s")
    empty = sum(not new and bool(old) for new, old in zip(answers.candidate, answers.live, strict=True))
    if empty:
        return RollBack(f"{empty} verification prompts got an empty answer, where the live version has one")
    if answers.agreement < policy.min_agreement:
        return RollBack(f"{answers.agreement:.0%} of its greedy answers are the live version's")
    if answers.expected:
        new, old = answers.right(answers.candidate), answers.right(answers.live)
        if new < old - policy.max_answer_loss:
            return RollBack(f"{new:.1%} of its answers are right, beside {old:.1%} of the live version's")
    return None


def judged_tokens(agreeing: Sequence[float | None], policy: Policy, within_s: float) -> RollBack | None:
    """As `judged`, of the fraction of each live answer's tokens that the candidate chose too; None where it failed."""
    found = [one for one in agreeing if one is not None]
    if failed := len(agreeing) - len(found):
        return RollBack(f"{failed} of {len(agreeing)} answers could not be followed within {within_s:.0f} s")
    if not found:
        return RollBack(
            "the live version's answers are empty, so that nothing can be compared; name rows with right answers by"
            " --prompts, or give --min-token-agreement 0"
        )
    mean = sum(found) / len(found)
    if mean < policy.min_token_agreement:
        return RollBack(
            f"it would choose {mean:.0%} of the tokens of the live version's answers, less than --min-token-agreement,"
            f" {policy.min_token_agreement:.0%}: one of them is broken, or they are meant to differ; then give 0"
        )
    return None


@dataclass(frozen=True)
class Vectors:
    """What both versions made of the verification texts; None for a vector that failed."""

    live: Sequence[np.ndarray]
    candidate: Sequence[np.ndarray | None]

    @property
    def similarity(self) -> float:
        """The mean cosine of the vectors of one text."""
        cosines = [_cosine(a, b) for a, b in zip(self.live, self.candidate, strict=True) if b is not None]
        return float(np.mean(cosines)) if cosines else 1.0


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / lengths if lengths else 0.0


def judged_vectors(vectors: Vectors, policy: Policy, within_s: float) -> RollBack | None:
    """As `judged`."""
    failed = sum(vector is None for vector in vectors.candidate)
    if failed:
        return RollBack(
            f"{failed} of {len(vectors.candidate)} verification texts got no vector within {within_s:.0f} s"
        )
    useless = sum(vector is not None and not (np.isfinite(vector).all() and vector.any())
                  for vector in vectors.candidate)  # fmt: skip
    if useless:
        return RollBack(f"{useless} verification texts got a vector that is zero or not finite")
    if vectors.similarity < policy.min_similarity:
        cosine = f"{vectors.similarity:.3f}"
        return RollBack(f"its vectors have a mean cosine of {cosine} to the live version's, less than --min-similarity")
    return None
