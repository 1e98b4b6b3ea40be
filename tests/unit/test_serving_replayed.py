"""Whether another version's answer is a version's own, token by token: with a scripted engine, and with real models."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayswift.errors import ServeError
from rayswift.models.loading import load_tokenizer
from rayswift.serving import replayed
from rayswift.serving.admission import Admission
from rayswift.serving.defaults import SamplingDefaults
from rayswift.serving.engine import Delta, EngineOptions, Request, TokenLogprob
from rayswift.serving.engines.local import Local
from rayswift.serving.prompts import PromptBuilder
from rayswift.serving.served import ServedModel

_ASKED = [{"role": "user", "content": "What does str.upper do?"}]
_SAID = "It returns a copy of the string in upper case, and so on and so forth."


@dataclass
class _Scripted:
    """Continues with the tokens of one answer, but at some places says something else, or ends."""

    prompts: PromptBuilder
    says: str
    wrong: frozenset[int] = frozenset()
    ends: frozenset[int] = frozenset()
    max_model_len: int = 2048
    places: list[int] = field(default_factory=list)

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        assert (request.sampling.temperature, request.sampling.max_new_tokens) == (0, 1)
        prompt, script = self.prompts.conversation(_ASKED).ids, self.prompts.answer_ids(self.says)
        begun = request.prompt.ids[len(prompt) :]
        assert request.prompt.ids == (*prompt, *script[: len(begun)])
        self.places.append(len(begun))
        token = -1 if len(begun) in self.wrong else script[len(begun)]
        scored = () if len(begun) in self.ends else (TokenLogprob("?", -0.1, id=token),)
        yield Delta("", 1, "length", scored)


def _model(folder: Path, **script: Any) -> tuple[Any, _Scripted]:
    prompts = PromptBuilder(load_tokenizer(str(folder)))
    engine = _Scripted(prompts, _SAID, **script)
    return SimpleNamespace(engine=engine, prompts=prompts), engine


def test_tokens_of_an_answer_are_chosen_anew_behind_those_before_them(tiny_model_dir: Path) -> None:
    model, engine = _model(tiny_model_dir)
    num_tokens = len(model.prompts.answer_ids(_SAID))
    assert asyncio.run(replayed.follows(model, _ASKED, _SAID)) == 1
    assert engine.places == [number * num_tokens // 8 for number in range(8)]  # spread over all of it
    wrong, ends = frozenset(engine.places[2:4]), frozenset(engine.places[5:6])
    model, _ = _model(tiny_model_dir, wrong=wrong, ends=ends)
    assert asyncio.run(replayed.follows(model, _ASKED, _SAID)) == 5 / 8


def test_an_answer_of_few_tokens_is_followed_at_each(tiny_model_dir: Path) -> None:
    model, engine = _model(tiny_model_dir)
    short = "It"
    assert asyncio.run(replayed.follows(model, _ASKED, short)) == 1
    assert engine.places == list(range(len(model.prompts.answer_ids(short))))


def test_an_answer_is_followed_as_far_as_there_is_room(tiny_model_dir: Path) -> None:
    model, engine = _model(tiny_model_dir)
    prompt = len(model.prompts.conversation(_ASKED).ids)
    engine.max_model_len = prompt + 3
    assert asyncio.run(replayed.follows(model, _ASKED, _SAID)) == 1
    assert engine.places == [0, 1, 2]
    engine.max_model_len = prompt
    with pytest.raises(ServeError, match="leaves no room for an answer"):
        asyncio.run(replayed.follows(model, _ASKED, _SAID))


def test_a_model_follows_its_own_answer_and_noise_does_not(tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir, noisy := tmp_path / "noisy")
    torch.manual_seed(1)
    weights = {name: torch.randn_like(one) for name, one in load_file(noisy / "model.safetensors").items()}
    save_file(weights, noisy / "model.safetensors", metadata={"format": "pt"})

    async def scenario() -> tuple[float, float]:
        models = []
        for folder in (tiny_model_dir, noisy):
            engine = Local(str(folder), EngineOptions(device="cpu"))
            await engine.start()
            prompts = PromptBuilder(load_tokenizer(str(folder)))
            models.append(ServedModel(engine, prompts, Admission(1, 1)))
        live, candidate = models
        try:
            said = await replayed.answer(live, _ASKED, 24)
            strict = replace(live, defaults=SamplingDefaults(repetition_penalty=2.0))
            assert await replayed.answer(strict, _ASKED, 24) != said  # clients would be answered so, too
            found = [await replayed.follows(one, _ASKED, said) for one in (live, candidate)]
            return found[0], found[1]
        finally:
            for one in models:
                await one.engine.close()

    own, noise = asyncio.run(scenario())
    assert own >= 7 / 8  # its text may be cut into other tokens than it was made of
    assert noise <= 1 / 8
