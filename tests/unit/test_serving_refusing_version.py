"""A new version that does not take what the live one takes: no client notices, and its promotion does."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from rayswift.models.loading import load_tokenizer
from rayswift.serving.admission import Admission
from rayswift.serving.engine import FakeEngine
from rayswift.serving.http import build_asgi
from rayswift.serving.promotion import Policy, RollBack, Window
from rayswift.serving.prompts import PromptBuilder
from rayswift.serving.served import ServedModel
from rayswift.serving.spec import ServeSpec
from rayswift.serving.tallies import Tally
from rayswift.serving.traffic import CountedEngine, Versions

_OLD, _NEW = "0" * 12, "1" * 12
_TAKES_ALL = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
_NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + _TAKES_ALL
_BROKEN = "{% if messages[0].role == 'system' %}{{ 1 + 'x' }}{% endif %}" + _TAKES_ALL
_SYSTEM = {"role": "system", "content": "be brief"}
_USER = {"role": "user", "content": "hello"}


class _Pair:
    """An app over two versions that share the traffic, each with a template and a count of its own."""

    def __init__(self, folder: Path, old: str, new: str) -> None:
        self.engines = {_OLD: CountedEngine(FakeEngine(("old",))), _NEW: CountedEngine(FakeEngine(("new",)))}
        self.models = {}
        for (version, engine), template in zip(self.engines.items(), (old, new), strict=True):
            tokenizer = load_tokenizer(str(folder))
            tokenizer.chat_template = template
            self.models[version] = ServedModel(engine, PromptBuilder(tokenizer), Admission(4, 4), version)
        versions = Versions(self.models, {_OLD: 0.5, _NEW: 0.5}, _OLD)
        self._app = build_asgi(ServeSpec(models={"m": "unused"}), {"m": versions})

    def chat(self, *messages: dict[str, str], count: int = 4, **more: Any) -> list[httpx.Response]:
        async def ask() -> list[httpx.Response]:
            transport = httpx.ASGITransport(self._app)
            body = {"model": "m", "messages": list(messages), **more}
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return [await client.post("/v1/chat/completions", json=body) for _ in range(count)]

        return asyncio.run(ask())

    def tally(self, version: str) -> Tally:
        return self.engines[version].tally


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("new", [_NO_SYSTEM, _BROKEN])
def test_the_live_version_answers_what_a_new_one_refuses_and_it_counts(
    tiny_model_dir: Path, new: str, stream: bool
) -> None:
    pair = _Pair(tiny_model_dir, _TAKES_ALL, new)
    replies = pair.chat(_SYSTEM, _USER, stream=stream)
    assert [(reply.status_code, reply.headers["X-RaySwift-Version"]) for reply in replies] == [(200, _OLD)] * 4
    assert (pair.tally(_NEW).started, pair.tally(_NEW).failed) == (2, 2)
    assert (pair.tally(_OLD).answered, pair.tally(_OLD).failed) == (4, 0)
    assert all(model.admission.in_flight == 0 for model in pair.models.values())
    seen = Window(elapsed_s=1, candidate=pair.tally(_NEW), live=pair.tally(_OLD))
    assert isinstance(Policy(min_requests=2).decide(seen), RollBack)


def test_what_an_engine_refuses_the_live_one_is_asked_for(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rayswift.serving.engine import Refused

    async def refuses(request: Any) -> Any:
        raise Refused("not by this one")
        yield

    pair = _Pair(tiny_model_dir, _TAKES_ALL, _TAKES_ALL)
    monkeypatch.setattr(pair.engines[_NEW].inner, "generate", refuses)
    assert [reply.status_code for reply in pair.chat(_USER)] == [200] * 4
    assert pair.tally(_NEW).failed == 2


def test_what_both_refuse_is_the_clients_fault(tiny_model_dir: Path) -> None:
    pair = _Pair(tiny_model_dir, _NO_SYSTEM, _NO_SYSTEM)
    for reply in pair.chat(_SYSTEM, _USER):
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (400, "messages")
        assert "no system turn" in error["message"]
    assert (pair.tally(_NEW).failed, pair.tally(_OLD).failed) == (0, 0)
    assert [reply.status_code for reply in pair.chat(_USER)] == [200] * 4


def test_who_asks_for_a_version_hears_its_own_refusal(tiny_model_dir: Path) -> None:
    pair = _Pair(tiny_model_dir, _TAKES_ALL, _NO_SYSTEM)

    async def ask() -> httpx.Response:
        transport, headers = httpx.ASGITransport(pair._app), {"X-RaySwift-Version": _NEW}
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
            return await client.post("/v1/chat/completions", json={"model": "m", "messages": [_SYSTEM, _USER]})

    assert asyncio.run(ask()).status_code == 400
    assert pair.tally(_NEW).failed == 0


def test_a_template_that_breaks_on_a_conversation_is_a_400_without_its_words(tiny_model_dir: Path) -> None:
    pair = _Pair(tiny_model_dir, _BROKEN, _BROKEN)
    for reply in pair.chat(_SYSTEM, _USER):
        message = reply.json()["error"]["message"]
        assert (reply.status_code, message) == (
            400, "messages: the model's chat template cannot write this conversation (TypeError)"
        )  # fmt: skip
