"""What stands for an engine in a front: deltas through a handle, its failures in our words, and what a front gives up.

The handle is a fake; that Ray Serve's behaves like it is proved in `tests/ray/test_serving_remote.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError

from rayswift.errors import ServeError
from rayswift.models.loading import load_tokenizer
from rayswift.serving import beats, remote
from rayswift.serving.admission import Admission
from rayswift.serving.api_errors import ApiError
from rayswift.serving.engine import Delta, Embedding, FakeEngine, Prompt, Refused, Request, Sampling
from rayswift.serving.facts import Facts
from rayswift.serving.prompts import PromptBuilder
from rayswift.serving.remote import RemoteEngine, VersionReplica
from rayswift.serving.served import ServedModel
from rayswift.serving.spec import ServeSpec

_REQUEST = Request("r", Prompt((1,)), Sampling(4))
_SPEC = ServeSpec(models={"m": "exports/v1"})


class _Stream:
    """A response generator of Serve, as far as it is used. What a replica could not take is raised again by cancel."""

    def __init__(self, items: AsyncGenerator[Any, None]) -> None:
        self._items, self._refused, self.cancelled = items, None, False
        self._replica_result_future: Future[Any] = Future()

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> Any:
        try:
            return await anext(self._items)
        except BackPressureError as error:
            self._refused = error
            raise

    def cancel(self) -> None:
        self.cancelled = True
        if self._refused is not None:
            raise self._refused


class _Method:
    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def remote(self, *arguments: Any) -> Any:
        return self._call(*arguments)


class _Handle:
    """The handle of one replica over a fake engine."""

    def __init__(self, engine: FakeEngine) -> None:
        # No instance of it: one that no replica ends would be ended by the collector.
        prompts = SimpleNamespace(chat_takes=frozenset({"messages"}))
        self.replica: Any = SimpleNamespace(_model=SimpleNamespace(engine=engine, prompts=prompts))
        self.streams: list[_Stream] = []
        self.unreachable: Exception | None = None
        self.hangs = False

    def options(self, *, method_name: str, stream: bool, **transport: Any) -> _Method:
        assert transport == {"_by_reference": False, "request_serialization": "pickle",
                             "response_serialization": "pickle"}  # fmt: skip
        if not stream:
            assert method_name == "facts"
            return _Method(self._facts)
        method = getattr(VersionReplica, method_name)
        return _Method(lambda *arguments: self._stream(method(self.replica, *arguments)))

    async def _facts(self) -> Facts:
        await self._reached()
        return await VersionReplica.facts(self.replica)

    def _stream(self, items: AsyncGenerator[Any, None]) -> _Stream:
        self.streams.append(_Stream(self._as_serve_does(items)))
        return self.streams[-1]

    async def _as_serve_does(self, items: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        await self._reached()
        try:
            async for item in items:
                yield item
        except ServeError as error:
            raise RayTaskError("generate", "traceback", error).as_instanceof_cause() from None
        finally:
            await items.aclose()

    async def _reached(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.unreachable is not None:
            raise self.unreachable


def _started(fake: FakeEngine) -> tuple[_Handle, RemoteEngine]:
    handle = _Handle(fake)
    engine = RemoteEngine(handle, _SPEC, "exports/v1")
    with pytest.raises(ServeError, match="was not started"):
        _ = engine.max_model_len
    asyncio.run(engine.start())
    return handle, engine


async def _all(engine: RemoteEngine) -> list[Delta]:
    return [delta async for delta in engine.generate(_REQUEST)]


def test_an_answer_is_the_engines_own() -> None:
    fake = FakeEngine(can_constrain=True)
    handle, engine = _started(fake)
    assert (engine.max_model_len, engine.can_constrain, engine.embedding, engine.media_encoder) == (
        64,
        True,
        None,
        None,
    )
    assert [delta.text for delta in asyncio.run(_all(engine))] == list(fake.pieces)
    assert not handle.streams[0].cancelled  # it had ended


def test_a_vector_is_the_engines_own() -> None:
    handle, engine = _started(FakeEngine(embedding=Embedding(4)))
    assert engine.embedding == Embedding(4)
    assert np.array_equal(asyncio.run(engine.embed([7, 8])), [7, 8, 1, 1])
    assert np.array_equal(asyncio.run(engine.embed([7, 8], 2)), [7, 8])
    assert not handle.streams[0].cancelled


def test_an_answer_that_nobody_reads_is_cancelled() -> None:
    handle, engine = _started(FakeEngine())

    async def leave() -> None:
        deltas = engine.generate(_REQUEST)
        await anext(deltas)
        await deltas.aclose()

    asyncio.run(leave())
    assert handle.streams[0].cancelled


@pytest.mark.parametrize("embeds", [False, True])
def test_what_no_replica_takes_is_given_up_and_known(monkeypatch: pytest.MonkeyPatch, embeds: bool) -> None:
    handle, engine = _started(FakeEngine(embedding=Embedding(4) if embeds else None))
    engine.check()
    monkeypatch.setattr(remote, "_TAKEN_TIMEOUT_S", 0.01)
    handle.hangs = True
    with pytest.raises(ServeError, match=r"exports/v1 has taken a request within 0\.01 s"):
        asyncio.run(engine.embed([1]) if embeds else _all(engine))  # type: ignore[arg-type]
    assert handle.streams[0].cancelled
    with pytest.raises(ServeError, match="has taken a request"):
        engine.check()
    handle.hangs = False
    asyncio.run(engine.ping())
    engine.check()


@pytest.mark.parametrize("embeds", [False, True])
@pytest.mark.parametrize(("retry_after_s", "told"), [(None, "2"), (6.5, "7")])
def test_a_full_version_is_not_down(embeds: bool, retry_after_s: float | None, told: str) -> None:
    handle, engine = _started(FakeEngine(embedding=Embedding(4) if embeds else None))
    full = BackPressureError(1, 1, retry_after_s=retry_after_s)
    for refusal in (full, RayTaskError("generate", "traceback", full).as_instanceof_cause()):
        handle.unreachable = refusal
        with pytest.raises(ApiError, match="at its limit of waiting requests") as caught:
            asyncio.run(engine.embed([1]) if embeds else _all(engine))  # type: ignore[arg-type]
        assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": told})
        engine.check()
        asyncio.run(engine.ping())  # nor by a ping that finds no place
        engine.check()


def test_a_ping_that_finds_no_place_does_not_raise_a_version_that_is_down() -> None:
    handle, engine = _started(FakeEngine())
    handle.unreachable = ActorDiedError()
    asyncio.run(engine.ping())
    handle.unreachable = BackPressureError(1, 1)
    asyncio.run(engine.ping())
    with pytest.raises(ServeError, match="no replica of exports/v1 answers: was lost"):
        engine.check()


def test_who_is_heard_meanwhile_is_too_full_to_take_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its replicas have no place for waits in Serve's queue, without a word."""
    handle, engine = _started(FakeEngine())
    monkeypatch.setattr(remote, "_TAKEN_TIMEOUT_S", 0.05)
    monkeypatch.setattr(remote, "_PING_TIMEOUT_S", 0.05)

    async def scenario() -> None:
        running = engine.generate(_REQUEST)
        await anext(running)
        handle.hangs = True
        refused, pinged = asyncio.create_task(_all(engine)), asyncio.create_task(engine.ping())
        await asyncio.sleep(0)  # both have asked
        await anext(running)
        with pytest.raises(ApiError) as caught:
            await refused
        assert caught.value.status == 429
        await pinged
        engine.check()
        await running.aclose()

    asyncio.run(scenario())


@pytest.mark.parametrize("lost", [ReplicaUnavailableError("r"), ActorDiedError()])
def test_what_serve_raises_is_told_as_a_lost_replica(lost: Exception) -> None:
    handle, engine = _started(FakeEngine())
    handle.unreachable = lost
    with pytest.raises(ServeError, match=f"was lost with its replica: {type(lost).__name__}"):
        asyncio.run(_all(engine))


def test_a_ping_tells_and_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    handle, engine = _started(FakeEngine())
    handle.unreachable = ActorDiedError()
    asyncio.run(engine.ping())
    with pytest.raises(ServeError, match="no replica of exports/v1 answers: was lost"):
        engine.check()
    handle.unreachable = None
    asyncio.run(engine.ping())
    engine.check()
    monkeypatch.setattr(remote, "_PING_TIMEOUT_S", 0.01)
    handle.hangs = True
    asyncio.run(engine.ping())
    with pytest.raises(ServeError, match=r"answers: not within 0\.01 s"):
        engine.check()


def test_what_the_engine_raises_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeEngine(failure="out of cache")
    _, engine = _started(fake)
    with pytest.raises(ServeError, match="out of cache"):
        asyncio.run(_all(engine))
    engine.check()  # a replica has taken it

    async def refuse(request: Request) -> AsyncGenerator[Delta, None]:
        raise Refused("no such adapter")
        yield

    monkeypatch.setattr(fake, "generate", refuse)
    with pytest.raises(Refused, match="no such adapter"):
        asyncio.run(_all(engine))


def _replica(folder: Path, engine: FakeEngine) -> Any:
    prompts = PromptBuilder(load_tokenizer(str(folder)))
    return SimpleNamespace(_model=ServedModel(engine, prompts, Admission(1, 1)))


def test_a_replica_answers_conversations_and_continues_texts(tiny_model_dir: Path) -> None:
    replica = _replica(tiny_model_dir, fake := FakeEngine(max_model_len=2048))
    hello = [{"role": "user", "content": "Hello"}]
    for asked in (hello, "Hello"):
        assert asyncio.run(VersionReplica.answer(replica, asked, 8)) == "".join(fake.pieces)
    chat, text = fake.seen
    assert chat.prompt.ids == replica._model.prompts.conversation(hello).ids
    assert text.prompt.ids == replica._model.prompts.text("Hello").ids
    assert chat.sampling.temperature == text.sampling.temperature == 0
    fake.max_model_len = 1
    with pytest.raises(ServeError, match="leaves no room for an answer"):
        asyncio.run(VersionReplica.answer(replica, "Hello", 8))


@pytest.mark.parametrize(
    ("template", "takes"),
    [(None, []), ("{{ messages }}", ["messages"]), ("{{ messages }}{{ tools }}", ["messages", "tools"]),
     ("{{ messages }}{{ tools }}<tool_call>", ["messages", "tool_choice", "tools"])],
)  # fmt: skip
def test_a_replica_says_which_conversations_it_takes(
    tiny_model_dir: Path, template: str | None, takes: list[str]
) -> None:
    tokenizer = load_tokenizer(str(tiny_model_dir))
    tokenizer.chat_template = template
    replica: Any = SimpleNamespace(_model=SimpleNamespace(engine=FakeEngine(), prompts=PromptBuilder(tokenizer)))
    assert asyncio.run(VersionReplica.facts(replica)) == Facts(64, False, False, None, frozenset(takes))


def test_a_replica_makes_the_vector_of_a_text(tiny_model_dir: Path) -> None:
    replica = _replica(tiny_model_dir, fake := FakeEngine(max_model_len=2048, embedding=Embedding(4)))
    ids = replica._model.prompts.text("Hello").ids
    assert np.array_equal(asyncio.run(VersionReplica.vector(replica, "Hello")), [*ids, 1, 1, 1, 1][:4])
    fake.max_model_len = len(ids) - 1
    with pytest.raises(ServeError, match="is too long"):
        asyncio.run(VersionReplica.vector(replica, "Hello"))


def test_a_version_lacks_what_clients_of_another_would_be_refused() -> None:
    chats = frozenset({"messages", "tools", "tool_choice"})
    text, vectors = Facts(64, False, False, None, chats), Facts(64, False, False, Embedding(4), chats)
    sees, constrains = replace(text, takes_media=True), replace(text, can_constrain=True)
    bare, plain, deaf = (
        replace(text, chat_takes=chats & set(known)) for known in ((), ("messages",), ("messages", "tools"))
    )
    any_cut, cuts, more_cuts, other_cuts = (
        replace(vectors, embedding=Embedding(4, True, found)) for found in ((), (2,), (1, 2), (3,))
    )
    for mine, live, told in [
        (text, sees, "text only"), (replace(text, max_model_len=63), text, "63 tokens beside 64"),
        (text, vectors, "vectors"), (vectors, text, "vectors"),
        (replace(vectors, embedding=Embedding(3)), vectors, "3 numbers beside 4"), (text, constrains, "JSON Schema"),
        (bare, text, "no chat template"), (bare, plain, "no chat template"), (deaf, text, "without tool_choice, which"),
        (plain, text, "does without tool_choice and tools, which"), (vectors, cuts, "cut to 2 numbers"),
        (cuts, more_cuts, "cut to 1 numbers"), (cuts, any_cut, "cut to 1 numbers"), (other_cuts, cuts, "cut to 2"),
    ]:  # fmt: skip
        assert told in str(mine.lacks(live))
    for mine, live in [
        (text, text), (sees, text), (vectors, vectors), (replace(text, max_model_len=65), text), (constrains, text),
        (text, bare), (text, deaf), (plain, bare), (cuts, vectors), (any_cut, cuts), (more_cuts, cuts),
        (replace(vectors, chat_takes=frozenset()), vectors),
    ]:  # fmt: skip
        assert mine.lacks(live) is None


@pytest.mark.parametrize(
    ("mine", "live", "is_shorter"),
    [(9984, 10240, False), (9984, 10241, True), (9728, 10240, True), (10240, 10300, False),  # the model's own is 10300
     (10000, 10240, True), (63, 64, True), (10240, 9984, False)],
)  # fmt: skip
def test_one_step_of_a_fitted_context_is_no_lack(mine: int, live: int, is_shorter: bool) -> None:
    made, other = (Facts(length, False, False, None, frozenset()) for length in (mine, live))
    assert made.lacks(other) == (f"its context has {mine} tokens beside {live}" if is_shorter else None)


@pytest.mark.parametrize("embeds", [False, True])
def test_an_engine_may_be_silent_for_longer_than_a_replica(monkeypatch: pytest.MonkeyPatch, embeds: bool) -> None:
    monkeypatch.setattr(beats, "BEAT_S", 0.02)
    monkeypatch.setattr(beats, "SILENT_S", 0.2)
    fake = FakeEngine(embedding=Embedding(2) if embeds else None)
    _, engine = _started(fake)

    async def scenario() -> None:
        fake.gate = asyncio.Event()
        asking = asyncio.ensure_future(engine.embed([1]) if embeds else _all(engine))  # type: ignore[arg-type]
        assert not (await asyncio.wait((asking,), timeout=3 * beats.SILENT_S))[0]
        fake.gate.set()
        assert len(await asking) == (2 if embeds else len(fake.pieces))

    asyncio.run(scenario())


@pytest.mark.parametrize("embeds", [False, True])
def test_a_replica_that_falls_silent_is_lost(monkeypatch: pytest.MonkeyPatch, embeds: bool) -> None:
    monkeypatch.setattr(beats, "SILENT_S", 0.05)  # and its next sign of life would come after 5 s
    fake = FakeEngine(embedding=Embedding(2) if embeds else None)
    handle, engine = _started(fake)

    async def scenario() -> None:
        fake.gate = asyncio.Event()
        with pytest.raises(ServeError, match="with its replica, of which nothing was heard"):
            await (engine.embed([1]) if embeds else _all(engine))  # type: ignore[arg-type]
        assert handle.streams[-1].cancelled

    asyncio.run(scenario())


def test_an_error_that_only_the_replica_knows_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeEngine()

    async def fail(request: Request) -> AsyncGenerator[Delta, None]:
        raise ZeroDivisionError("a secret")
        yield

    monkeypatch.setattr(fake, "generate", fail)
    _, engine = _started(fake)
    with pytest.raises(ServeError, match=r"failed inside its replica: ZeroDivisionError$"):
        asyncio.run(_all(engine))
