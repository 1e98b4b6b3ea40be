"""The decisions of a promotion: when a step passes, when it is held, and every reason to go back."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayswift.errors import ConfigError
from rayswift.serving.promotion import (
    Advance,
    Answers,
    Hold,
    Policy,
    RollBack,
    Vectors,
    Window,
    judged,
    judged_tokens,
    judged_vectors,
)
from rayswift.serving.tallies import Tally, counted

_POLICY = Policy(step_s=60, min_requests=20)


def _tally(answered: int, failed: int = 0, seconds: float = 0.2) -> Tally:
    first, whole = Tally().first, Tally().whole
    for _ in range(answered):
        first, whole = counted(first, seconds), counted(whole, 4 * seconds)
    return Tally(answered + failed, answered, failed, 0, first, whole)


def test_a_step_takes_its_time_and_its_requests() -> None:
    good = _tally(100)
    assert _POLICY.decide(Window(59, good, good)) == Hold()
    assert _POLICY.decide(Window(60, good, good)) == Advance()
    assert _POLICY.decide(Window(60, _tally(19), good)) == Hold(needs_requests=True)


def test_one_error_is_too_many_among_few_and_allowed_among_many() -> None:
    found = _POLICY.decide(Window(1, _tally(3, failed=1), _tally(50)))
    assert found == RollBack("1 of its 4 answers failed")
    assert _POLICY.decide(Window(60, _tally(299, failed=1), _tally(50))) == Advance()


def test_what_fails_as_often_at_the_live_version_is_no_fault_of_the_candidate() -> None:
    few, failing = _tally(50), _tally(380, failed=20)
    for live, live_before, beside in [
        (few, Tally(), failing), (failing, Tally(), few), (few, failing, few),  # what is nearest and enough to tell
    ]:  # fmt: skip
        window = Window(60, _tally(37, failed=3), live, live_before, beside)
        assert _POLICY.decide(window) == Advance()
        found = _POLICY.decide(replace(window, candidate=_tally(28, failed=12)))
        assert isinstance(found, RollBack)
        rate = "4.4%" if live_before is failing else "5.0%"
        assert found.reason == f"12 of its 40 answers failed, beside {rate} of the live version's"


@pytest.mark.parametrize(("rate", "least", "most"), [(0.05, 0, 2), (0.15, 98, 100)])
def test_beside_a_live_version_that_fails_an_equal_one_passes_and_a_worse_one_does_not(
    rate: float, least: int, most: int
) -> None:
    """Of 100 steps with 500 answers of each, looked at after every fifth, in percent."""
    dice, num_back = random.Random(0), 0
    for _ in range(100):
        mine, beside = [0, 0], [0, 0]
        for number in range(500):
            mine[dice.random() < rate] += 1
            beside[dice.random() < 0.05] += 1
            if number % 5:
                continue
            candidate, live = Tally(sum(mine), *mine), Tally(sum(beside), *beside)
            found = _POLICY.decide(Window(1, candidate, live, Tally(1000, 950, 50), live))
            if isinstance(found, RollBack):
                num_back += 1
                break
    assert least <= num_back <= most


def test_what_is_over_and_what_may_be_chance_excuses_no_candidate() -> None:
    some, strict = _tally(37, failed=3), RollBack("3 of its 40 answers failed")
    assert _POLICY.decide(Window(60, some, _tally(300), _tally(200, failed=200), _tally(300))) == strict
    assert _POLICY.decide(Window(60, some, _tally(18, failed=1))) == strict
    never = replace(_POLICY, max_error_rate=0, min_requests=0)
    assert never.decide(Window(60, _tally(39, failed=1), _tally(950))) == RollBack("1 of its 40 answers failed")
    assert never.decide(Window(60, Tally(), _tally(900, failed=50))) == Advance()


def test_an_answer_that_waits_too_long_for_a_token_has_failed() -> None:
    policy = replace(_POLICY, max_token_wait_s=10)
    hangs = replace(_tally(3), started=5, waits=counted(counted(Tally().waits, 20), 2))
    assert policy.decide(Window(1, hangs, _tally(50))) == RollBack(
        "1 of its 4 answers failed, 1 of them by waiting more than 10 s for a token"
    )
    assert policy.decide(Window(1, hangs, Tally())) == policy.decide(Window(1, hangs, _tally(50)))
    # Where the live version took 15 s once, 20 s are no hang; and many good answers outweigh a bad one.
    slow = replace(_tally(50), first=counted(_tally(50).first, 15))
    assert policy.decide(Window(1, hangs, slow)) == Hold()
    assert policy.decide(Window(60, replace(_tally(299), waits=hangs.waits), _tally(50))) == Advance()


def test_what_misses_the_deadline_is_told() -> None:
    found = _POLICY.decide(Window(1, replace(_tally(18, failed=3), late=2), _tally(50)))
    assert found == RollBack("3 of its 21 answers failed, 2 of them by taking longer than request_timeout_s")


def test_a_slow_version_goes_back_before_the_step_ends() -> None:
    found = _POLICY.decide(Window(5, _tally(20, seconds=0.5), _tally(20, seconds=0.2)))
    assert isinstance(found, RollBack)
    assert "p50 to the first token" in found.reason
    # With too few of the live version there is nothing to compare with, and milliseconds are no difference.
    unjudged = Advance("latency, for the live version has 19 answers to compare with")
    assert _POLICY.decide(Window(60, _tally(20, seconds=0.5), _tally(19))) == unjudged
    assert _POLICY.decide(Window(60, _tally(20, seconds=0.009), _tally(20, seconds=0.003))) == Advance()


def test_a_live_version_without_traffic_beside_the_candidate_is_compared_as_it_was_before() -> None:
    """As with --steps 1, where it has none from the first moment on."""
    slow = Window(60, _tally(20, seconds=0.5), _tally(0), _tally(20))
    found = _POLICY.decide(slow)
    assert isinstance(found, RollBack)
    assert "p50 to the first token is" in found.reason
    assert _POLICY.decide(replace(slow, live_before=_tally(20, seconds=0.5))) == Advance()
    # What it takes now is what counts, where enough is known of that.
    assert _POLICY.decide(replace(slow, live=_tally(20, seconds=0.5))) == Advance()


def test_a_version_that_its_clients_give_up_goes_back() -> None:
    def left(abandoned: int, started: int) -> Tally:
        return Tally(started, started - abandoned, abandoned=abandoned)

    def found(mine: Tally, beside: Tally) -> object:
        return _POLICY.decide(Window(1, mine, Tally(), beside=beside))

    assert found(left(20, 40), left(5, 100)) == RollBack(
        "50% of its answers were abandoned before their end, beside 5% of the live version's"
    )
    # Chance, a little more, too few, and a job of many requests that is stopped, at both.
    for mine, beside in [(left(12, 20), left(30, 100)), (left(150, 1000), left(10, 1000)),
                         (left(19, 19), left(0, 100)), (left(20, 20), left(0, 19)),
                         (left(90, 100), left(80, 90))]:  # fmt: skip
        assert found(mine, beside) == Hold()


@given(st.integers(0, 60), st.integers(0, 5), st.integers(0, 60), st.floats(0, 200), st.floats(0.01, 3))
def test_no_step_passes_early_or_with_more_errors_than_allowed(
    answered: int, failed: int, live: int, elapsed_s: float, seconds: float
) -> None:
    window = Window(elapsed_s, _tally(answered, failed, seconds), _tally(live))
    decision = _POLICY.decide(window)
    if isinstance(decision, Advance):
        assert elapsed_s >= _POLICY.step_s
        assert answered + failed >= _POLICY.min_requests
        assert failed <= _POLICY.max_error_rate * (answered + failed)
    if isinstance(decision, RollBack):
        worse = replace(window, candidate=window.candidate + Tally(1, 0, 1))
        assert isinstance(_POLICY.decide(worse), RollBack)  # another failure makes nothing better


@pytest.mark.parametrize("steps", [(), (0.5,), (0.5, 0.2, 1.0), (0.0, 1.0), (0.5, 1.5), (0.5, 0.5, 1.0)])
def test_steps_grow_to_all_of_the_traffic(steps: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="growing shares"):
        Policy(steps=steps)


@pytest.mark.parametrize(
    ("field", "value"),
    [("step_s", -1), ("min_requests", -1), ("max_wait_s", -1), ("max_error_rate", -1), ("max_latency_ratio", 0.5),
     ("max_answer_loss", -0.1), ("min_agreement", 90), ("max_error_rate", 2), ("step_s", float("nan")),
     ("max_token_wait_s", -1), ("min_similarity", 2), ("min_token_agreement", -0.1)],
)  # fmt: skip
def test_bounds_beyond_sense_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match="is out of bounds; write a number"):
        replace(_POLICY, **{field: value})


def test_a_step_without_traffic_is_held_for_a_while_and_then_goes_back() -> None:
    policy = replace(_POLICY, max_wait_s=30)
    few = Window(0, _tally(3), _tally(100))
    assert policy.decide(replace(few, elapsed_s=89)) == Hold(needs_requests=True)
    found = policy.decide(replace(few, elapsed_s=90))
    assert isinstance(found, RollBack)
    assert "3 of 20 answers in 90 s; lower --min-requests" in found.reason
    assert replace(policy, min_requests=0).decide(replace(few, elapsed_s=60)) == Advance()


def test_answers_are_judged() -> None:
    assert judged(Answers(["a", "b"], ["a", "c"]), _POLICY, 60) is None
    for answers, policy, reason in [
        (Answers(["a", "b"], ["a", None]), _POLICY, "1 of 2 verification prompts were not answered within 60 s"),
        (Answers(["a", "b"], ["a", ""]), _POLICY, "empty answer"),
        (Answers(["a", "b"], ["a", "c"]), replace(_POLICY, min_agreement=0.9), "50% of its greedy answers"),
        (Answers(["a", "b"], ["a", "c"], ["a", "b"]), _POLICY, "50.0% of its answers are right, beside 100.0%"),
    ]:
        found = judged(answers, policy, 60)
        assert found is not None
        assert reason in found.reason
    assert judged(Answers(["x", "b"], ["a ", "b"], ["a", "b"]), _POLICY, 60) is None


def test_right_answers_vouch_only_where_a_version_without_any_would_not_pass() -> None:
    wanted = [str(number) for number in range(100)]
    for num_right, vouch in ((0, False), (2, False), (3, True)):
        said = [*wanted[:num_right], *["garbage"] * (100 - num_right)]
        assert Answers(wanted, said, wanted).vouch(_POLICY) is vouch
    assert not Answers(["a"], ["a"]).vouch(_POLICY)
    assert not Answers(["a"], ["b"], ["a"]).vouch(replace(_POLICY, max_answer_loss=0))


def test_tokens_are_judged_by_their_mean() -> None:
    assert judged_tokens([0.2, 0.0], _POLICY, 60) is None
    assert judged_tokens([1.0, 0.0], replace(_POLICY, min_token_agreement=0.5), 60) is None
    for agreeing, reason in [
        ([0.5, None], "1 of 2 answers could not be followed within 60 s"),
        (
            [0.06, 0.04],
            "it would choose 5% of the tokens of the live version's answers, less than --min-token-agreement",
        ),
        ([], "the live version's answers are empty, so that nothing can be compared; name rows with right answers"),
    ]:
        found = judged_tokens(agreeing, _POLICY, 60)
        assert found is not None
        assert reason in found.reason


def test_vectors_are_judged_by_their_cosine() -> None:
    one, other = np.array([1.0, 0.0]), np.array([0.6, 0.8])
    assert Vectors([one, one], [one, other]).similarity == pytest.approx(0.8)
    assert judged_vectors(Vectors([one, one], [2 * one, other]), replace(_POLICY, min_similarity=0.75), 60) is None
    assert judged_vectors(Vectors([one], [-one]), replace(_POLICY, min_similarity=-1), 60) is None
    for candidate, reason in [
        ([other, one * 0.5, None], "1 of 3 verification texts got no vector within 60 s"),
        ([one, np.zeros(2), np.array([1, np.nan])], "2 verification texts got a vector that is zero or not finite"),
        ([one, other, -one], "a mean cosine of 0.200 to the live version's, less than --min-similarity"),
    ]:
        found = judged_vectors(Vectors([one] * 3, candidate), _POLICY, 60)
        assert found is not None
        assert reason in found.reason


def test_patience_follows_the_live_version() -> None:
    assert [replace(_POLICY, max_token_wait_s=10).patience_s(live_s) for live_s in (0, 4, 8)] == [10, 10, 16]
    bounds = [(30, 0, 60), (30, 15, 60), (30, 20, 80), (90, 20, 90)]  # of whole answers, which take more than a token
    for token_s, live_s, answer_s in bounds:
        assert replace(_POLICY, max_token_wait_s=token_s).answer_patience_s(live_s) == answer_s
