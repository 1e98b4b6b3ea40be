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
from rayswift.serving.promotion import Answers, Policy, RollBack, Vectors, judged, judged_tokens, judged_vectors
from rayswift.serving.questions import Question
from rayswift.serving.routing import Target

_AT_ONCE, _MEANWHILE_S, _LEAST_S = 8, 5.0, 0.1
Say = Callable[[str], None]


class Replay:
    """The verification prompts: how the live version answered them, and whether another one may."""

    def __init__(
        self, questions: Sequence[Question], timeout_s: float, say: Say, meanwhile: Callable[[], object]
    ) -> None:
        """`meanwhile` is called at least every few seconds while answers are waited for."""
        self._questions, self._timeout_s, self._say, self._meanwhile = list(questions), timeout_s, say, meanwhile
        self._live: list[Any] = []
        self._live_s, self._embeds = 0.0, False

    def compare(self, live: Target, candidate: Target) -> None:
        """Raises PromotionError when the candidate cannot take what the live version takes.

        Texts are cut to half of what both have room for.
        """
        until = time.monotonic() + self._timeout_s
        asked = [serve.get_app_handle(one.app).facts.remote() for one in (live, candidate)]
        old, new = (self._result(response, until) for response in asked)
        lack = new.lacks(old) if old is not None and new is not None else "it does not say what it takes"
        if lack is not None:
            raise PromotionError(lack)
        self._embeds = old.embedding is not None
        self._questions = [one.within(old.max_model_len // 2) for one in self._questions]

    def hear(self, live: Target) -> None:
        """Ask the live version. What it cannot answer is no measure of another one, and left out."""
        answers, self._live_s = self._answers(live, self._timeout_s)
        kept = [(one, said) for one, said in zip(self._questions, answers, strict=True) if said is not None]
        if len(kept) < len(answers):
            self._say(f"{len(answers) - len(kept)} of {len(answers)} prompts are not answered by the live version")
        self._questions, self._live = [one for one, _ in kept], [said for _, said in kept]

    def judge(self, candidate: Target, policy: Policy) -> None:
        """Raises PromotionError when the candidate's answers are worse than allowed, or do not come.

        And where the live version could answer nothing, so that there is nothing to compare with.
        """
        if not self._questions:
            raise PromotionError("cannot be verified: the live version answers none of the prompts", path="EXPORT",
                                 value=candidate.folder, fix="name rows that it can answer with --prompts")  # fmt: skip
        within_s = min(self._timeout_s, policy.answer_patience_s(self._live_s))
        said, _ = self._answers(candidate, within_s)
        if self._embeds:
            verdict, told = self._judged_vectors(said, policy, within_s)
        else:
            verdict, told = self._judged(candidate, said, policy, within_s)
        if verdict is not None:
            raise PromotionError(verdict.reason)
        self._say(f"{len(self._questions)} prompts answered, {told}")

    def _judged(
        self, candidate: Target, said: list[Any], policy: Policy, within_s: float
    ) -> tuple[RollBack | None, str]:
        expected = [one.expected for one in self._questions]
        known = [text for text in expected if text is not None]
        answers = Answers(self._live, said, known if len(known) == len(expected) else None)
        verdict, told = judged(answers, policy, within_s), f"{answers.agreement:.0%} as the live version does"
        if verdict is None and policy.min_token_agreement > 0 and not answers.vouch(policy):
            agreeing = self._agreeing(candidate, said, within_s)
            verdict = judged_tokens(agreeing, policy, within_s)
            told += f", {sum(one or 0 for one in agreeing) / max(len(agreeing), 1):.0%} token by token"
        return verdict, told

    def _agreeing(self, candidate: Target, said: list[Any], within_s: float) -> list[float | None]:
        """The fraction of the tokens of each live answer that a candidate chooses too: all of one that it gives itself.

        None for what has failed. Empty answers have no tokens, and are left out.
        """
        both = [(one, old, new) for one, old, new in zip(self._questions, self._live, said, strict=True) if old]
        others = [(one, old) for one, old, new in both if old != new]
        found, _ = self._asked(candidate, within_s, "follows", [(one.asked, old) for one, old in others])
        return [1.0] * (len(both) - len(others)) + found

    def _judged_vectors(self, said: list[Any], policy: Policy, within_s: float) -> tuple[RollBack | None, str]:
        vectors = Vectors(self._live, said)
        told = f"with a mean cosine of {vectors.similarity:.3f} to the live version's"
        return judged_vectors(vectors, policy, within_s), told

    def _answers(self, target: Target, timeout_s: float) -> tuple[list[Any], float]:
        """What a version says, or the vectors it makes, as `_asked`."""
        if self._embeds:
            return self._asked(target, timeout_s, "vector", [(one.text,) for one in self._questions])
        return self._asked(target, timeout_s, "answer", [(one.asked, one.max_new_tokens) for one in self._questions])

    def _asked(
        self, target: Target, timeout_s: float, method: str, calls: Sequence[tuple[Any, ...]]
    ) -> tuple[list[Any], float]:
        """What a method of a version says to each of these, and the seconds that those asked at once took at most.

        None for what has failed, or was not there in time.
        """
        handle, slowest_s = serve.get_app_handle(target.app), 0.0
        found: list[Any] = []
        for start in range(0, len(calls), _AT_ONCE):
            began = time.monotonic()
            asked = [getattr(handle, method).remote(*call) for call in calls[start : start + _AT_ONCE]]
            found += [self._result(response, began + timeout_s) for response in asked]
            slowest_s = max(slowest_s, time.monotonic() - began)
        return found, slowest_s

    def _result(self, response: Any, until: float) -> Any:
        """What a replica returns; None where it fails or has not by then."""
        while True:
            self._meanwhile()
            try:
                return response.result(timeout_s=min(_MEANWHILE_S, max(_LEAST_S, until - time.monotonic())))
            except RayTaskError:
                return None
            except TimeoutError:  # GetTimeoutError is a RayError too
                if time.monotonic() >= until:
                    response.cancel()
                    return None
            except (RayError, RayServeException, ServeError):
                return None
