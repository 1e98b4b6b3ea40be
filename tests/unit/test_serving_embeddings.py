"""POST /v1/embeddings over a fake engine: what is answered, refused, bounded and given up."""

from __future__ import annotations

import asyncio
import json
import threading
from base64 import b64decode
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from rayswift.errors import ServeError
from rayswift.models.loading import load_tokenizer
from rayswift.serving import auth
from rayswift.serving.admission import Admission
from rayswift.serving.engine import Embedding, FakeEngine, Refused
from rayswift.serving.http import build_asgi
from rayswift.serving.prompts import PromptBuilder
from rayswift.serving.served import ServedModel
from rayswift.serving.spec import ApiKey, ServeSpec
from rayswift.serving.traffic import CountedEngine, Versions
from rayswift.serving.versions import VERSION_HEADER

_PATH, _VERSION, _KEY = "/v1/embeddings", "0" * 12, "a-key-for-tests-0123"


class _Server:
    """`e` makes vectors of 8 numbers, `m` answers; what `e` is made of is at hand."""

    def __init__(self, folder: Path, engine: FakeEngine | None = None, **spec: Any) -> None:
        self.spec = ServeSpec(models={"e": "unused", "m": "unused"}, **spec)
        self.tokenizer = load_tokenizer(str(folder))
        self.engine = engine or FakeEngine(embedding=Embedding(8))
        self.admission = Admission(self.spec.max_concurrency, self.spec.max_queued)
        self.model = ServedModel(self.engine, self._prompts(self.engine), self.admission, _VERSION)
        talking = FakeEngine()
        models = {"e": self.model, "m": ServedModel(talking, self._prompts(talking), Admission(4, 4))}
        self.app = build_asgi(self.spec, models)

    def _prompts(self, engine: FakeEngine) -> PromptBuilder:
        return PromptBuilder(self.tokenizer, max_tokens=engine.max_model_len)

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://localhost", timeout=20)

    def ask(self, path: str = _PATH, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        async def once() -> httpx.Response:
            async with self.http() as client:
                given = {"model": "e", "input": "hi"} if path == _PATH else {"model": "e"}
                return await client.post(path, json=given | body, headers=headers)

        return asyncio.run(once())

    def vectors(self, *texts: str | list[int], num_dims: int = 8) -> list[list[float]]:
        """What FakeEngine makes of these texts."""
        ids = [text if isinstance(text, list) else self.tokenizer(text)["input_ids"] for text in texts]
        return [[*map(float, one), *[1.0] * 8][:num_dims] for one in ids]


@pytest.fixture
def make(tiny_model_dir: Path) -> Callable[..., _Server]:
    return lambda *args, **spec: _Server(tiny_model_dir, *args, **spec)


@pytest.mark.parametrize("given", ["hi there", ["hi there"], ["a b", "c"], [5, 6, 7], [[5, 6, 7], [8]], ["a", [5]]])
def test_every_form_of_input_is_answered_in_order(make: Callable[..., _Server], given: Any) -> None:
    server = make()
    texts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    reply = server.ask(input=given, user="somebody")
    expected = server.vectors(*texts)
    num_tokens = sum(len(one if isinstance(one, list) else server.tokenizer(one)["input_ids"]) for one in texts)
    assert reply.json() == {
        "object": "list", "model": "e", "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        "data": [{"object": "embedding", "index": i, "embedding": one} for i, one in enumerate(expected)],
    }  # fmt: skip
    assert reply.headers[VERSION_HEADER] == _VERSION
    assert (server.engine.running, server.admission.in_flight) == (0, 0)


def test_base64_is_what_the_official_client_asks_for_and_reads(make: Callable[..., _Server]) -> None:
    server, asked = make(), list[Any]()

    async def scenario() -> Any:
        async def note(request: httpx.Request) -> None:
            asked.append(json.loads(request.content))

        async with server.http() as transport:
            transport.event_hooks["request"].append(note)
            client = openai.AsyncOpenAI(
                base_url="http://localhost/v1", api_key="none", max_retries=0, http_client=transport
            )
            plain = await client.embeddings.create(model="e", input=["a", "b c"], encoding_format="float")
            return await client.embeddings.create(model="e", input=["a", "b c"]), plain

    decoded, plain = asyncio.run(scenario())
    assert [one.get("encoding_format") for one in asked] == ["float", "base64"]
    assert (
        [one.embedding for one in decoded.data] == [one.embedding for one in plain.data] == server.vectors("a", "b c")
    )
    assert decoded.usage.total_tokens == plain.usage.prompt_tokens > 0
    raw = server.ask(encoding_format="base64").json()["data"][0]["embedding"]
    assert np.frombuffer(b64decode(raw), dtype="<f4").tolist() == server.vectors("hi")[0]


def test_vectors_are_cut_only_where_the_model_was_trained_for_it(make: Callable[..., _Server]) -> None:
    def dims(embedding: Embedding, wanted: int) -> int | str:
        reply = make(FakeEngine(embedding=embedding)).ask(dimensions=wanted).json()
        return len(reply["data"][0]["embedding"]) if "data" in reply else str(reply["error"]["message"])

    assert dims(Embedding(8), 8) == 8
    assert "4 is not what this model makes; its vectors have 8 numbers, and are not" in str(dims(Embedding(8), 4))
    assert [dims(Embedding(8, is_matryoshka=True), wanted) for wanted in (1, 7, 8)] == [1, 7, 8]
    assert "have 8 numbers or fewer" in str(dims(Embedding(8, is_matryoshka=True), 9))
    assert dims(Embedding(8, is_matryoshka=True, cuts=(2, 4)), 4) == 4
    assert "have 8 numbers or 2, 4" in str(dims(Embedding(8, is_matryoshka=True, cuts=(2, 4)), 3))


def test_each_kind_of_model_refuses_what_the_other_is_for(make: Callable[..., _Server]) -> None:
    server = make()
    turns = {"messages": [{"role": "user", "content": "hi"}]}
    asked = {
        "Chat Completions API: it makes vectors": server.ask("/v1/chat/completions", **turns),
        "not support the Completions API: it makes vectors": server.ask("/v1/completions", prompt="hi"),
        "Embeddings API: it generates text": server.ask(model="m"),
    }
    for words, reply in asked.items():
        assert reply.status_code == 400
        assert words in reply.json()["error"]["message"]
        assert reply.json()["error"]["code"] == "model_not_supported"
    assert server.ask("/v1/chat/completions", **turns, model="m").status_code == 200


def test_models_say_which_is_which(make: Callable[..., _Server]) -> None:
    async def scenario() -> list[Any]:
        async with make().http() as client:
            return [*(await client.get("/v1/models")).json()["data"], (await client.get("/v1/models/e")).json()]

    assert [(card["id"], card["task"]) for card in asyncio.run(scenario())] == [
        ("e", "embed"), ("m", "generate"), ("e", "embed")
    ]  # fmt: skip


def test_a_text_that_is_too_long_is_named(make: Callable[..., _Server]) -> None:
    server = make()
    whole = list(range(3, 3 + server.engine.max_model_len))
    assert server.ask(input=whole).status_code == 200
    for given in ([[5], [*whole, 5]], ["a", "word " * 300], ["a", "a" * 100_000]):
        error = server.ask(input=given).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "input[1]")
    error = server.ask(input=["a", [10**6]]).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", "input[1]")
    assert (server.engine.running, server.admission.in_flight) == (0, 0)


def test_a_long_list_runs_a_few_texts_at_a_time_and_leaves_room(make: Callable[..., _Server]) -> None:
    class Watched(FakeEngine):
        most = 0

        async def embed(self, ids: Sequence[int], num_dims: int | None = None) -> np.ndarray:
            vector = await super().embed(ids, num_dims)
            self.most = max(self.most, self.running + 1)
            return vector

    engine = Watched(embedding=Embedding(8))
    server = make(engine, max_concurrency=3, max_queued=0)
    reply = server.ask(input=[[number % 500] for number in range(2048)]).json()
    assert [one["embedding"][0] for one in reply["data"]] == [number % 500 for number in range(2048)]
    assert engine.most == 3
    assert server.ask(input=["a"] * 2049).status_code == 400


def test_places_are_counted_and_a_full_queue_is_told(make: Callable[..., _Server]) -> None:
    async def scenario() -> None:
        gate = asyncio.Event()
        server = make(FakeEngine(embedding=Embedding(8), gate=gate), max_concurrency=2, max_queued=1)
        async with server.http() as client:
            first = asyncio.create_task(client.post(_PATH, json={"model": "e", "input": ["a"] * 5}))
            await _until(lambda: server.engine.running == 2)
            assert server.admission.in_flight == 2
            full = await client.post(_PATH, json={"model": "e", "input": ["a", "b"]})
            assert (full.status_code, full.headers["retry-after"]) == (429, "2")
            gate.set()
            assert len((await first).json()["data"]) == 5
        assert (server.engine.running, server.admission.in_flight) == (0, 0)

    asyncio.run(scenario())


def test_a_request_that_takes_too_long_is_given_up(make: Callable[..., _Server]) -> None:
    async def scenario() -> None:
        gated = FakeEngine(embedding=Embedding(8), gate=asyncio.Event())
        server = make(gated, request_timeout_s=0.1)
        async with server.http() as client:
            reply = await client.post(_PATH, json={"model": "e", "input": ["a"] * 20})
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "timeout")
        assert reply.headers["retry-after"] == "1"
        assert (server.engine.running, server.admission.in_flight) == (0, 0)

    asyncio.run(scenario())


def test_texts_that_take_too_long_to_read_are_given_up(
    make: Callable[..., _Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, read = make(request_timeout_s=0.2), threading.Event()
    monkeypatch.setattr(server.model.prompts, "text", lambda *_: read.wait(30))

    async def scenario() -> None:
        async with server.http() as client:
            try:
                reply = await client.post(_PATH, json={"model": "e", "input": "a"})
                assert (reply.status_code, reply.json()["error"]["code"]) == (503, "timeout")
                assert server.admission.in_flight == 0
            finally:
                read.set()

    asyncio.run(scenario())


def test_a_client_that_goes_away_frees_its_places(make: Callable[..., _Server]) -> None:
    async def scenario() -> None:
        gone = asyncio.Event()
        server = make(FakeEngine(embedding=Embedding(8), gate=asyncio.Event()))
        messages = [{"type": "http.request", "body": b'{"model": "e", "input": ["a", "b"]}', "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            return None

        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "path": _PATH, "raw_path": b"/", "query_string": b"", "root_path": "", "scheme": "http",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }  # fmt: skip
        call = asyncio.create_task(server.app(scope, receive, send))
        await _until(lambda: server.engine.running == 2)
        gone.set()
        await asyncio.wait_for(call, 10)
        assert (server.engine.running, server.admission.in_flight) == (0, 0)

    asyncio.run(scenario())


async def _until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)


class _Odd(FakeEngine):
    """Answers the text [7] with what it is given: an error, or a vector that is not finite."""

    odd: Exception | None = None

    async def embed(self, ids: Sequence[int], num_dims: int | None = None) -> np.ndarray:
        if tuple(ids) != (7,):
            return await super().embed(ids, num_dims)
        if self.odd is not None:
            raise self.odd
        return np.array([np.nan] * 8, dtype=np.float32)


@pytest.mark.parametrize(
    ("odd", "status"), [(ServeError("broken"), 503), (Refused("not this text"), 400), (KeyError("x"), 500), (None, 503)]
)
def test_what_goes_wrong_has_a_status_and_frees_its_places(
    make: Callable[..., _Server], odd: Exception | None, status: int
) -> None:
    engine = _Odd(embedding=Embedding(8))
    engine.odd = odd
    server = make(engine)
    reply = server.ask(input=[[5], [7], [6]])
    assert reply.status_code == status
    assert ("not this text" in reply.text) == (status == 400)
    assert "broken" not in reply.text
    assert (server.engine.running, server.admission.in_flight) == (0, 0)
    assert server.ask(input=[[5]]).status_code == 200


def test_a_keys_limits_and_models_hold_here_too(make: Callable[..., _Server]) -> None:
    key = ApiKey(name="k", sha256=auth.fingerprint(_KEY), requests_per_minute=3, models=("e",))
    server, headers = make(api_keys=(key,)), {"Authorization": f"Bearer {_KEY}"}
    assert server.ask().status_code == 401
    assert server.ask(headers=headers).headers["x-ratelimit-remaining-requests"] == "2"
    assert server.ask(headers=headers, model="m").status_code == 403
    assert server.ask(headers=headers).status_code == 200
    assert server.ask(headers=headers).status_code == 429


def test_versions_count_requests_and_fall_back_to_the_live_one(make: Callable[..., _Server]) -> None:
    server = make()
    broken = FakeEngine(embedding=Embedding(8), failure="broken")
    broken.check = lambda: None  # type: ignore[method-assign]  # what is known to be down is not tried
    counted = {name: CountedEngine(one) for name, one in ((_VERSION, server.engine), ("1" * 12, broken))}
    prompts = server.model.prompts
    models = {name: ServedModel(one, prompts, Admission(4, 4), name) for name, one in counted.items()}
    served = Versions(models, {"1" * 12: 1}, _VERSION)
    assert served.embeds
    server.app = build_asgi(server.spec, {"e": served})
    reply = server.ask(input=["x"] * 4)
    assert (reply.status_code, reply.headers[VERSION_HEADER]) == (200, _VERSION)
    assert [(one.tally.answered, one.tally.failed) for one in counted.values()] == [(1, 0), (0, 1)]
    assert server.ask(headers={VERSION_HEADER: "1" * 12}).status_code == 503
