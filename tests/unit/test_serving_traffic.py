"""Versions of one model: exact shares, counts of what became of each answer, and what happens when one fails."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayswift.errors import ServeError
from rayswift.models.loading import load_tokenizer
from rayswift.serving import traffic
from rayswift.serving.admission import Admission
from rayswift.serving.api_errors import overloaded
from rayswift.serving.embeddings import vectors_of
from rayswift.serving.engine import Delta, Embedding, FakeEngine, Prompt, Request, Sampling
from rayswift.serving.flow import DEADLINE, choice_deltas, deadline_in
from rayswift.serving.http import build_asgi
from rayswift.serving.prompts import PromptBuilder
from rayswift.serving.routing import WeightedPick
from rayswift.serving.served import ServedModel
from rayswift.serving.spec import ServeSpec
from rayswift.serving.tallies import EDGES_S, Tally, counted, longer_than, quantile_s
from rayswift.serving.traffic import CountedEngine, Versions

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
    more = Tally(1, 2, 0, 0, waits=counted(Tally().waits, 3), late=1)
    late = early + more
    assert late - early == more
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


def test_only_what_is_longer_for_certain_counts() -> None:
    buckets = Tally().waits
    for seconds in (0.1, 29, 31, 50, 10**6):
        buckets = counted(buckets, seconds)
    assert longer_than(buckets, 30) == 2  # 31 s share a bucket with 30
    assert longer_than(buckets, 10**7) == 0
    assert longer_than(tuple(-count for count in buckets), 30) == 0  # waits that have ended


class _Clock:
    """The time as `traffic` reads it."""

    def __init__(self) -> None:
        self.now, self.reads = 100.0, 0

    def monotonic(self) -> float:
        self.reads += 1
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    made = _Clock()
    monkeypatch.setattr(traffic, "time", made)
    return made


@dataclass
class _Hanging(FakeEngine):
    """Gives the first tokens of an answer and then nothing more. `asked` counts the tokens that are waited for."""

    num_tokens: int = 0
    asked: int = 0

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        for _ in range(self.num_tokens):
            yield Delta("x", 1)
        self.asked += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.asked -= 1

    async def embed(self, ids: Sequence[int], num_dims: int | None = None) -> np.ndarray:
        await anext(self.generate(_REQUEST))
        raise AssertionError("it hangs")


async def _hangs(fake: _Hanging, count: int = 1) -> None:
    async with asyncio.timeout(10):
        while fake.asked != count:
            await asyncio.sleep(0)


async def _whole(engine: CountedEngine, embeds: bool = False) -> list[Delta]:
    if embeds:
        await engine.embed([1])
    return [delta async for delta in engine.generate(_REQUEST)]


@pytest.mark.parametrize("embeds", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 2])
def test_how_long_a_token_is_waited_for_is_told_while_it_is(clock: _Clock, embeds: bool, num_tokens: int) -> None:
    async def scenario() -> None:
        engine = CountedEngine(fake := _Hanging(num_tokens=0 if embeds else num_tokens))
        task = asyncio.create_task(_whole(engine, embeds))
        await _hangs(fake)
        for waited_s in (1, 40):
            clock.now = 100.0 + waited_s
            assert (engine.tally.running, longer_than(engine.tally.waits, 30)) == (1, int(waited_s > 30))
        task.cancel()  # its client leaves
        await asyncio.gather(task, return_exceptions=True)
        clock.now += 1000
        assert (engine.tally.running, engine.tally.abandoned, engine.tally.failed) == (0, 1, 0)
        assert engine.tally.waits == counted(Tally().waits, 40)  # what it had waited stays known

    asyncio.run(scenario())


def test_a_slow_reader_is_no_wait(clock: _Clock) -> None:
    async def scenario() -> None:
        engine = CountedEngine(_Hanging(num_tokens=1))
        deltas = engine.generate(_REQUEST)
        await anext(deltas)
        clock.now += 1000
        assert engine.tally.waits == Tally().waits
        await deltas.aclose()
        assert engine.tally.waits == Tally().waits

    asyncio.run(scenario())


@pytest.mark.parametrize("embeds", [False, True])
def test_what_has_not_begun_in_time_is_given_up_and_the_rest_goes_on(embeds: bool) -> None:
    async def scenario() -> None:
        engine = CountedEngine(fake := _Hanging())
        hanging = asyncio.create_task(_whole(engine, embeds))
        await _hangs(fake)
        fake.num_tokens = 1
        streaming = engine.generate(_REQUEST)
        await anext(streaming)
        engine.give_up(0.01)
        engine.give_up(0.01)  # twice is once
        with pytest.raises(ServeError, match="was given up: its version has lost its traffic"):
            await hanging
        await _hangs(fake, 0)  # its place is free again
        assert (engine.tally.failed, engine.tally.running) == (1, 1)
        last = asyncio.create_task(anext(streaming))
        await _hangs(fake)
        assert not last.done()  # what has begun nobody else could continue
        last.cancel()
        await asyncio.gather(last, return_exceptions=True)

    asyncio.run(scenario())


def test_what_queues_at_a_version_that_answers_others_is_given_up_once_that_hangs(clock: _Clock) -> None:
    async def looked_at() -> None:
        reads = clock.reads
        async with asyncio.timeout(10):
            while clock.reads < reads + 2:
                await asyncio.sleep(0.005)

    async def scenario() -> None:
        engine = CountedEngine(fake := _Hanging(num_tokens=3))
        streaming = engine.generate(_REQUEST)
        await anext(streaming)
        fake.num_tokens = 0
        queued = asyncio.create_task(_whole(engine))
        await _hangs(fake)
        engine.give_up(0.01)
        for _ in range(2):
            clock.now += 1
            await anext(streaming)  # somebody has got a token
            await looked_at()
            assert not queued.done()
        clock.now += 1
        with pytest.raises(ServeError, match="was given up"):
            await asyncio.wait_for(queued, 10)
        await streaming.aclose()

    asyncio.run(scenario())


@pytest.mark.parametrize("embeds", [False, True])
def test_what_had_chosen_a_version_before_it_was_given_up_is_given_up_too(clock: _Clock, embeds: bool) -> None:
    async def scenario() -> None:
        engine = CountedEngine(fake := _Hanging())
        engine.give_up(0)
        clock.now += 29  # in which its prompt was made
        with pytest.raises(ServeError, match="was given up"):
            await asyncio.wait_for(_whole(engine, embeds), 10)
        clock.now += 2
        later = asyncio.create_task(_whole(engine, embeds))
        await _hangs(fake)
        (answer,) = engine._running
        assert answer.patience is not None
        assert answer.patience.when() is None
        later.cancel()
        await asyncio.gather(later, return_exceptions=True)

    asyncio.run(scenario())


def test_the_vectors_of_a_request_are_one_answer(clock: _Clock) -> None:
    class Slow(FakeEngine):
        async def embed(self, ids: Sequence[int], num_dims: int | None = None) -> np.ndarray:
            clock.now += 1
            return await super().embed(ids, num_dims)

    async def scenario() -> None:
        engine = CountedEngine(fake := Slow(embedding=Embedding(2)))
        texts = [[number] for number in range(5)]
        assert [list(one) for one in await vectors_of(engine, texts, None, 1)] == [[n, 1] for n in range(5)]
        tally = engine.tally
        assert (tally.started, tally.answered, quantile_s(tally.first, 1), quantile_s(tally.whole, 1)) == (
            1, 1, *(quantile_s(counted(Tally().first, seconds), 1) for seconds in (1, 5)),
        )  # fmt: skip
        fake.failure = "broken"
        with pytest.raises(ServeError):
            await vectors_of(engine, texts, None, 2)
        assert (engine.tally.started, engine.tally.failed, engine.tally.running) == (2, 1, 0)
        fake.failure, fake.gate = None, asyncio.Event()
        hangs = asyncio.create_task(vectors_of(engine, texts, None, 2))
        while fake.running < 2:
            await asyncio.sleep(0)
        clock.now += 100
        assert longer_than(engine.tally.waits, 50) == 1
        engine.give_up(10)
        with pytest.raises(ServeError, match="was given up"):
            await hangs
        assert (engine.tally.started, engine.tally.failed, engine.tally.running) == (3, 2, 0)
        fake.gate = None
        await engine.embed([1])  # by itself as before
        assert engine.tally.answered == 2

    asyncio.run(scenario())


def test_what_begins_in_time_is_not_given_up() -> None:
    async def scenario() -> None:
        engine = CountedEngine(fake := FakeEngine(gate=asyncio.Event(), embedding=Embedding(2)))
        task = asyncio.create_task(engine.embed([7]))
        while not fake.running:
            await asyncio.sleep(0)
        engine.give_up(60)
        assert fake.gate is not None
        fake.gate.set()
        assert list(await task) == [7, 1]

    asyncio.run(scenario())


def test_what_a_full_version_has_no_place_for_the_live_one_answers_and_it_has_not_failed(tiny_model_dir: Path) -> None:
    pair = _Pair(tiny_model_dir, 0.5)
    counted_new = CountedEngine(pair.new)
    models = {**pair.models, _NEW: replace(pair.models[_NEW], engine=counted_new)}
    pair.app = build_asgi(ServeSpec(models={"m": "x"}), {"m": Versions(models, {_OLD: 0.5, _NEW: 0.5}, _OLD)})

    async def full(request: Request) -> AsyncGenerator[Delta, None]:
        raise overloaded(7)
        yield

    pair.new.generate = full  # type: ignore[method-assign]
    for stream in (False, True):
        for reply in pair.ask(2, stream=stream):
            assert (reply.status_code, reply.headers["X-RaySwift-Version"]) == (200, _OLD)
    assert (counted_new.tally.abandoned, counted_new.tally.failed) == (2, 0)
    pair.old.generate = full  # type: ignore[method-assign]
    for reply in (*pair.ask(2), *pair.ask(version=_NEW)):  # both full; and who asks for one is not given another
        assert (reply.status_code, reply.headers["Retry-After"]) == (429, "7")
    assert all(model.admission.in_flight == 0 for model in models.values())


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


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_hanging_version_was_asked_the_live_one_answers_once_it_is_taken_back(
    tiny_model_dir: Path, stream: bool
) -> None:
    pair = _Pair(tiny_model_dir, 0)
    hanging = CountedEngine(fake := _Hanging())
    models = {**pair.models, _NEW: replace(pair.models[_NEW], engine=hanging)}
    served = {"m": Versions(models, {_NEW: 1}, _OLD)}
    app = build_asgi(ServeSpec(models={"m": "unused"}), served)

    async def scenario() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            body = {"model": "m", "prompt": "x", "stream": stream}
            asked = asyncio.create_task(client.post("/v1/completions", json=body))
            await _hangs(fake)
            served["m"] = Versions(pair.models, {_OLD: 1}, _OLD)
            hanging.give_up(0)
            return await asked

    reply = asyncio.run(scenario())
    assert (reply.status_code, reply.headers["X-RaySwift-Version"]) == (200, _OLD)
    assert hanging.tally.failed == 1


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


@pytest.mark.parametrize(("stream", "num_choices"), [(False, 1), (True, 1), (False, 2), (True, 2)])
def test_an_answer_that_our_own_deadline_ends_is_a_failure_of_its_version(
    tiny_model_dir: Path, stream: bool, num_choices: int
) -> None:
    engine = CountedEngine(_Hanging(num_tokens=3))
    model = ServedModel(engine, PromptBuilder(load_tokenizer(str(tiny_model_dir))), Admission(4, 4), _NEW)
    versions = Versions({_NEW: model}, {_NEW: 1}, _NEW)
    app = build_asgi(ServeSpec(models={"m": "unused"}, request_timeout_s=0.3), {"m": versions})

    async def scenario() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            body = {"model": "m", "prompt": "x", "stream": stream, "n": num_choices}
            return await client.post("/v1/completions", json=body)

    reply = asyncio.run(scenario())
    assert "the answer took longer than this server allows" in reply.text
    assert (engine.tally.started, engine.tally.failed, engine.tally.late) == (num_choices,) * 3
    assert (engine.tally.abandoned, engine.tally.running, model.admission.in_flight) == (0, 0, 0)


@pytest.mark.parametrize("num_places", [1, 2])
def test_a_vector_that_our_own_deadline_ends_is_a_failure_of_its_version(tiny_model_dir: Path, num_places: int) -> None:
    engine = CountedEngine(_Hanging(embedding=Embedding(2)))
    model = ServedModel(engine, PromptBuilder(load_tokenizer(str(tiny_model_dir))), Admission(num_places, 4), _NEW)
    versions = Versions({_NEW: model}, {_NEW: 1}, _NEW)
    app = build_asgi(ServeSpec(models={"m": "unused"}, request_timeout_s=0.1), {"m": versions})

    async def scenario() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.post("/v1/embeddings", json={"model": "m", "input": ["x", "x"]})

    assert asyncio.run(scenario()).status_code == 503
    assert (engine.tally.started, engine.tally.failed, engine.tally.late, engine.tally.abandoned) == (1, 1, 1, 0)


@pytest.mark.parametrize(
    ("token_s", "reader_s", "is_late"), [(20, 0, True), (60, 0, True), (0, 20, False), (9, 0, False)]
)
def test_only_a_deadline_that_passes_while_a_token_is_waited_for_is_missed(
    clock: _Clock, token_s: float, reader_s: float, is_late: bool
) -> None:
    class Steady(FakeEngine):
        async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
            while True:
                clock.now += token_s
                yield Delta("x", 1)

    async def scenario() -> None:
        DEADLINE.set(clock.now + 50)
        engine = CountedEngine(Steady())
        deltas = engine.generate(_REQUEST)
        for _ in range(5):
            await anext(deltas)
            clock.now += reader_s
        await deltas.aclose()  # later than the deadline, as a busy event loop may be, or by the client
        assert (engine.tally.failed, engine.tally.late, engine.tally.abandoned) == (is_late, is_late, not is_late)

    asyncio.run(scenario())


@pytest.mark.parametrize("num_choices", [1, 2])
def test_what_a_client_leaves_is_no_failure(num_choices: int) -> None:
    async def scenario() -> None:
        engine = CountedEngine(_Hanging(num_tokens=3))
        leaving = choice_deltas(engine, [_REQUEST] * num_choices, deadline_in(60))
        await anext(leaving)
        await leaving.aclose()  # between two tokens
        asking = choice_deltas(engine, [_REQUEST] * num_choices, deadline_in(60))
        waits = asyncio.create_task(_all(asking))
        while engine.tally.started < 2 * num_choices:
            await asyncio.sleep(0)
        waits.cancel()  # while a token is waited for
        await asyncio.gather(waits, return_exceptions=True)
        assert (engine.tally.abandoned, engine.tally.failed, engine.tally.running) == (2 * num_choices, 0, 0)

    asyncio.run(scenario())


async def _all(deltas: AsyncGenerator[tuple[int, Delta], None]) -> None:
    async for _ in deltas:
        pass


def test_health_is_good_while_one_version_is_well(tiny_model_dir: Path) -> None:
    pair = _Pair(tiny_model_dir, 0.5)
    versions = Versions(pair.models, {_OLD: 1}, _OLD)
    pair.new.failure = "broken"
    versions.check()
    pair.old.failure = "broken"
    with pytest.raises(Exception, match="broken"):
        versions.check()
    assert not versions.takes_media
