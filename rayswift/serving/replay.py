"""Verification prompts asked of versions that run: what the live one says, and whether another one may answer too.

Knows Ray Serve's handles of `VersionReplica`. How answers are compared is known by `serving/promotion.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from rayswift.errors import PromotionError, ServeError
from rayswift.serving.promotion import Answers, Policy, judged
from rayswift.serving.questions import Question
from rayswift.serving.routing import Target

_AT_ONCE, _MEANWHILE_S = 8, 5.0
Say = Callable[[str], None]


class Replay:
    """The verification prompts: how the live version answered them, and whether another one may."""

    def __init__(
        self, questions: Sequence[Question], timeout_s: float, say: Say, meanwhile: Callable[[], object]
    ) -> None:
        """`meanwhile` is called at least every few seconds while answers are waited for."""
        self._questions, self._timeout_s, self._say, self._meanwhile = list(questions), timeout_s, say, meanwhile
        self._live: list[str | None] = []

    def compare(self, live: Target, candidate: Target) -> None:
        """Raises PromotionError when the candidate cannot take what the live version takes."""
        old, new = (self._result(serve.get_app_handle(one.app).facts.remote()) for one in (live, candidate))
        lack = new.lacks(old) if old is not None and new is not None else "it does not say what it takes"
        if lack is not None:
            raise PromotionError(lack)

    def hear(self, live: Target) -> None:
        """Ask the live version. What it cannot answer is no measure of another one, and left out."""
        answers = self._answers(live)
        kept = [(one, said) for one, said in zip(self._questions, answers, strict=True) if said is not None]
        if len(kept) < len(answers):
            self._say(f"{len(answers) - len(kept)} of {len(answers)} prompts are not answered by the live version")
        self._questions, self._live = [one for one, _ in kept], [said for _, said in kept]

    def judge(self, candidate: Target, policy: Policy) -> None:
        """Raises PromotionError when the candidate's answers are worse than allowed."""
        if not self._questions:
            return
        expected = [one.expected for one in self._questions]
        known = [text for text in expected if text is not None]
        answers = Answers(self._live, self._answers(candidate), known if len(known) == len(expected) else None)
        verdict = judged(answers, policy)
        if verdict is not None:
            raise PromotionError(verdict.reason)
        self._say(f"{len(self._questions)} prompts answered, {answers.agreement:.0%} as the live version does")

    def _answers(self, target: Target) -> list[str | None]:
        handle = serve.get_app_handle(target.app)
        found: list[str | None] = []
        for start in range(0, len(self._questions), _AT_ONCE):
            asked = [handle.answer.remote(one.turns, one.max_new_tokens)
                     for one in self._questions[start : start + _AT_ONCE]]  # fmt: skip
            found += [self._result(response) for response in asked]
        return found

    def _result(self, response: Any) -> Any:
        """What a replica returns; None where it fails or takes too long."""
        until = time.monotonic() + self._timeout_s
        while True:
            self._meanwhile()
            try:
                return response.result(timeout_s=_MEANWHILE_S)
            except RayTaskError:
                return None
            except TimeoutError:  # GetTimeoutError is a RayError too
                if time.monotonic() > until:
                    response.cancel()
                    return None
            except (RayError, RayServeException, ServeError):
                return None
