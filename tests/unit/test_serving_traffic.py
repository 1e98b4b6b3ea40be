"""Versions of one model: exact shares, counts of what became of each answer, and what happens when one fails."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayswift.errors import ServeError
from rayswift.models.loading import load_tokenizer
from rayswift.serving.admission import Admission
from rayswift.serving.engine import Delta, FakeEngine, Prompt, Request, Sampling
from rayswift.serving.http import build_asgi
from rayswift.serving.prompts import PromptBuilder
from rayswift.serving.served import ServedModel
from rayswift.serving.spec import ServeSpec
from rayswift.serving.traffic import EDGES_S, CountedEngine, Tally, Versions, WeightedPick, counted, quantile_s

_OLD, _NEW = "0" * 12, "1" * 12
_REQUEST = Request("r", Prompt((1,)), Sampling(4))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any), st.integers(1, 300))
def test_shares_are_exact_at_every_moment(weights: list[int], num_picks: int) -> None:
    pick, seen = WeightedPick({str(i): float(weight) for i, weight in enumerate(weights)}), Counter[str]()
    for number in range(1, num_picks + 1):
        seen[pick()] += 1
        for i, weight in enumerate(weights):
            assert abs(seen[str(i)] - number * weight / sum(weights)) < len(weights)
    assert all(seen[str(i)] == 0 for i, weight in enumerate(weights) if not weight)


def test_quantiles_are_upper_edges() -> None:
    buckets = Tally().first
    assert quantile_s(buckets, 0.5) is None
    for seconds in (0.1, 0.1, 0.1, 5.0):
        buckets = counted(buckets, seconds)
    half, most = quantile_s(buckets, 0.5), quantile_s(buckets, 0.95)
    assert half is not None
    assert most is not None
    assert 0.1 <= half <= 0.125
    assert 5 <= most <= 6.25
    assert quantile_s(counted(Tally().first, 10**6), 0.5) == EDGES_S[-1] * 1.25


def test_tallies_add_and_subtract() -> None:
    early = Tally(3, 1, 1, 0, counted(Tally().first, 0.1), counted(Tally().whole, 1))
    late = early + Tally(1, 2, 0, 0)
    assert late - early == Tally(1, 2, 0, 0)
    assert (late.ended, late.running) == (4, 0)


def test_answers_failures_and_clients_that_leave_are_told_apart() -> None:
    async def scenario() -> Tally:
        engine = CountedEngine(fake := FakeEngine())
        assert [delta.text async for delta in engine.generate(_REQUEST)] == list(fake.pieces)
        leaving = engine.generate(_REQUEST)
        await anext(leaving)
        assert engine.tally.running == 1
        await leaving.aclose()
        assert fake.running == 0
        fake.failure = "broken"
        with pytest.raises(Exception, match="broken"):
            await anext(engine.generate(_REQUEST))
        return engine.tally

    found = asyncio.run(scenario())
    assert (found.started, found.answered, found.failed, found.abandoned, found.running) == (3, 1, 1, 1, 0)
    assert sum(found.first) == sum(found.whole) == 1


class _Pair:
    """An app over an old and a new version of one model, with the weights they have."""

    def __init__(self, folder: Path, new_weight: float) -> None:
        prompts = PromptBuilder(load_tokenizer(str(folder)))
        self.old, self.new = FakeEngine(("old",)), FakeEngine(("new",))
        models = {
            version: ServedModel(engine, prompts, Admission(4, 4), version)
            for version, engine in ((_OLD, self.old), (_NEW, self.new))
        }
        self.models = models
        versions = Versions(models, {_OLD: 1 - new_weight, _NEW: new_weight}, _OLD)
        self.app = build_asgi(ServeSpec(models={"m": "unused"}), {"m": versions})

    def ask(self, count: int = 1, version: str | None = None, stream: bool = False) -> list[httpx.Response]:
        async def all_of_them() -> list[httpx.Response]:
            transport = httpx.ASGITransport(self.app)
            headers = {"X-RaySwift-Version": version} if version else {}
            body = {"model": "m", "prompt": "x", "stream": stream}
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
                return [await client.post("/v1/completions", json=body) for _ in range(count)]

        return asyncio.run(all_of_them())


def test_requests_are_shared_by_weight_and_replies_say_who_answered(tiny_model_dir: Path) -> None:
    pair = _Pair(tiny_model_dir, 0.25)
    replies = pair.ask(40)
    assert Counter(reply.headers["X-RaySwift-Version"] for reply in replies) == {_OLD: 30, _NEW: 10}
    for reply in replies:
        is_new = reply.json()["system_fingerprint"] == _NEW
        assert reply.json()["choices"][0]["text"] == ("new" if is_new else "old")


def test_a_version_of_no_weight_answers_who_asks_for_it(tiny_model_dir: Path) -> None:
    pair = _Pair(tiny_model_dir, 0)
    assert {reply.headers["X-RaySwift-Version"] for reply in pair.ask(5)} == {_OLD}
    assert pair.ask(version=_NEW)[0].json()["choices"][0]["text"] == "new"
    assert pair.ask(version="2" * 12)[0].status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_new_version_cannot_answer_the_live_one_answers(tiny_model_dir: Path, stream: bool) -> None:
    pair = _Pair(tiny_model_dir, 0.5)
    pair.new.failure, pair.new.check = "broken", lambda: None  # type: ignore[method-assign]  # not known to be down
    for reply in pair.ask(6, stream=stream):
        assert (reply.status_code, reply.headers["X-RaySwift-Version"]) == (200, _OLD)
    assert len(pair.new.seen) == 3
    assert pair.ask(version=_NEW)[0].status_code == 503  # who asks for it by name is not given another
    assert all(model.admission.in_flight == 0 for model in pair.models.values())


def test_a_new_version_that_is_known_to_be_down_is_not_tried(tiny_model_dir: Path) -> None:
    pair = _Pair(tiny_model_dir, 0.5)
    pair.new.failure = "broken"
    assert {reply.headers["X-RaySwift-Version"] for reply in pair.ask(6)} == {_OLD}
    assert not pair.new.seen
    pair.new.failure = None
    assert {reply.headers["X-RaySwift-Version"] for reply in pair.ask(6)} == {_OLD, _NEW}


def test_a_version_that_is_down_fails_by_every_request_that_was_meant_for_it(tiny_model_dir: Path) -> None:
    pair = _Pair(tiny_model_dir, 0.5)
    counted_new = CountedEngine(pair.new)
    models = {**pair.models, _NEW: replace(pair.models[_NEW], engine=counted_new)}
    versions = Versions(models, {_OLD: 0.5, _NEW: 0.5}, _OLD)
    pair.new.failure = "broken"
    assert {versions.pick(None).version for _ in range(6)} == {_OLD}
    assert (counted_new.tally.started, counted_new.tally.failed, counted_new.tally.running) == (3, 3, 0)


def test_a_request_that_was_meant_for_a_replaced_version_is_answered(tiny_model_dir: Path) -> None:
    """It chose the version while that one was live, and begins when it has ended."""
    pair = _Pair(tiny_model_dir, 0)
    served = {"m": Versions(pair.models, {_OLD: 1}, _OLD)}
    pair.app = build_asgi(ServeSpec(models={"m": "unused"}), served)

    async def ended(request: Request) -> AsyncGenerator[Delta, None]:
        served["m"] = Versions({_NEW: pair.models[_NEW]}, {_NEW: 1}, _NEW)
        raise ServeError("was lost with its replica")
        yield

    pair.old.generate = ended  # type: ignore[method-assign]
    (reply,) = pair.ask()
    assert (reply.status_code, reply.headers["X-RaySwift-Version"]) == (200, _NEW)


def test_health_is_good_while_one_version_is_well(tiny_model_dir: Path) -> None:
    pair = _Pair(tiny_model_dir, 0.5)
    versions = Versions(pair.models, {_OLD: 1}, _OLD)
    pair.new.failure = "broken"
    versions.check()
    pair.old.failure = "broken"
    with pytest.raises(Exception, match="broken"):
        versions.check()
    assert not versions.takes_media
