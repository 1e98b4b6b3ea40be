"""The `local` engine on a tiny model: what it generates alone is what it generates in any company."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from rayswift.config.job import ModelSpec
from rayswift.errors import ConfigError, ServeError
from rayswift.models.init import random_model
from rayswift.models.loading import load_model, load_tokenizer
from rayswift.serving.admission import Admission
from rayswift.serving.engine import Delta, EngineOptions, Prompt, Request, Sampling
from rayswift.serving.engines.local import Local
from rayswift.serving.http import build_asgi
from rayswift.serving.local import proof
from rayswift.serving.local.batch import Prefill, SlotBatch, SoloBatch, open_batch
from rayswift.serving.local.loop import DecodeLoop, Ticket, Vocabulary
from rayswift.serving.local.proof import differences, prove
from rayswift.serving.prompts import PromptBuilder
from rayswift.serving.served import ServedModel
from rayswift.serving.spec import ServeSpec
from tests.tokenizer_cases import KINDS, tokenizer_of

torch.set_num_threads(1)
_GREEDY = Sampling(max_new_tokens=24, temperature=0)


class _Runner:
    """A started engine on an event loop of its own, so that tests stay plain functions."""

    def __init__(self, folder: str, options: EngineOptions) -> None:
        self._runner = asyncio.Runner()
        self.engine = Local(folder, options)
        self.run(self.engine.start())

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(work)

    def answer(self, prompt_ids: list[int], sampling: Sampling) -> Delta:
        return self.run(_answer(self.engine, prompt_ids, sampling))

    def close(self) -> None:
        self.run(self.engine.close())
        self._runner.close()


async def _answer(engine: Local, prompt_ids: list[int], sampling: Sampling) -> Delta:
    total = Delta("", 0)
    async for delta in engine.generate(Request("r", Prompt(tuple(prompt_ids)), sampling)):
        total = total + delta
    return total


@pytest.fixture(scope="module")
def runner(tiny_model_dir: Path):
    started = _Runner(str(tiny_model_dir), EngineOptions(max_concurrency=5, device="cpu"))
    yield started
    started.close()


def _prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to 300 ids, so that rows differ in length by more than a slot's first columns."""
    chance = random.Random(seed)
    return [[chance.randrange(3, 500) for _ in range(chance.choice([1, 2, 7, 40, 130, 300]))] for _ in range(count)]


def test_greedy_text_is_that_of_transformers_generate(runner: _Runner, tiny_model_dir: Path) -> None:
    from transformers import AutoTokenizer

    model = load_model(ModelSpec(path=str(tiny_model_dir)))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    for prompt in _prompts(4):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, use_cache=True
        )
        expected = tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).rstrip("\ufffd")
        assert runner.answer(prompt, _GREEDY).text == expected


def test_mixed_concurrent_load_gives_the_text_of_one_at_a_time(runner: _Runner) -> None:
    prompts = _prompts(16, seed=1)
    samplings = [
        Sampling(max_new_tokens=5 + 3 * i, temperature=0 if i % 2 else 0.8, seed=i, top_p=0.9) for i in range(16)
    ]
    alone = [runner.answer(prompt, sampling) for prompt, sampling in zip(prompts, samplings, strict=True)]

    async def together() -> list[Delta]:
        tasks = []
        for prompt, sampling in zip(prompts, samplings, strict=True):
            tasks.append(asyncio.create_task(_answer(runner.engine, prompt, sampling)))
            await asyncio.sleep(0)
        return await asyncio.gather(*tasks)

    assert runner.run(together()) == alone
    assert len({delta.text for delta in alone}) > 8  # a constant answer would prove nothing


@pytest.mark.parametrize("arch", ["qwen3", "llama", "gpt2"])
def test_slot_batch_equals_solo_batch_while_rows_join_and_leave(arch: str) -> None:
    model = _model(arch)
    slots, solo = open_batch(model), SoloBatch(model)
    assert isinstance(slots, SlotBatch)
    chance, rows = random.Random(0), 0
    with torch.inference_mode():
        for _ in range(40):
            if rows and chance.random() < 0.25:
                row = chance.randrange(rows)
                slots.leave(row)
                solo.leave(row)
                rows -= 1
            if rows < 6 and chance.random() < 0.5:
                prompt = tuple(chance.randrange(64) for _ in range(chance.choice([1, 3, 20, 150])))
                for batch in (slots, solo):
                    prefill = Prefill(model, Prompt(prompt), 64)
                    while prefill.advance() is None:
                        pass
                    batch.join(prefill.cache)
                rows += 1
            if rows:
                tokens = [chance.randrange(64) for _ in range(rows)]
                torch.testing.assert_close(slots.decode(tokens), solo.decode(tokens), atol=2e-5, rtol=1e-5)


def test_a_model_without_plain_caches_is_run_row_by_row() -> None:
    assert isinstance(open_batch(_model("mistral", sliding_window=8)), SoloBatch)


def _model(arch: str, **extra: Any) -> Any:
    from transformers import AutoConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    if arch == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
    else:
        sizes |= {"num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8}
    config = AutoConfig.for_model(arch, **sizes, **extra)
    return random_model(config, seed=0).eval()


def test_a_seed_repeats_and_other_seeds_differ(runner: _Runner) -> None:
    prompt = _prompts(1)[0]
    texts = [runner.answer(prompt, Sampling(12, temperature=1.0, seed=seed)).text for seed in (7, 7, 8, None)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_stop_string_ends_the_answer_before_itself(runner: _Runner) -> None:
    prompt = _prompts(3)[2]
    whole = runner.answer(prompt, _GREEDY).text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    cut = runner.answer(prompt, Sampling(24, temperature=0, stop=(stop, "never-there")))
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.num_tokens < 24


def test_length_and_token_count(runner: _Runner) -> None:
    delta = runner.answer([5, 6], Sampling(3, temperature=0))
    assert (delta.num_tokens, delta.finish_reason) == (3, "length")


def test_logprobs_are_of_the_chosen_tokens(runner: _Runner) -> None:
    delta = runner.answer([5, 6], Sampling(4, temperature=0, logprobs=3))
    assert len(delta.logprobs) == 4
    for item in delta.logprobs:
        assert item.logprob <= 0
        assert item.top[0] == (item.token, item.logprob)  # greedy takes the likeliest
        assert [value for _, value in item.top] == sorted((value for _, value in item.top), reverse=True)


def test_closing_the_generator_frees_the_place(runner: _Runner) -> None:
    async def scenario() -> Delta:
        long = Sampling(max_new_tokens=1500, temperature=1.0, seed=0)
        streams: list[AsyncIterator[Delta]] = [
            runner.engine.generate(Request(str(i), Prompt((5, 6)), long)) for i in range(5)
        ]
        for stream in streams:  # every place of the batch is taken
            await anext(stream)
        waiting = asyncio.create_task(_answer(runner.engine, [5, 6], Sampling(2, temperature=0)))
        await streams[-1].aclose()  # type: ignore[attr-defined]
        answered = await asyncio.wait_for(waiting, 20)
        # The five are the same answer and the first began first: it has not ended, so the place is the closed one's.
        assert (await anext(streams[0])).finish_reason is None
        for stream in streams[:-1]:
            await stream.aclose()  # type: ignore[attr-defined]
        return answered

    assert runner.run(scenario()).num_tokens == 2


def test_a_failing_step_fails_its_answers_and_the_engine_goes_on(
    runner: _Runner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = runner.engine._started()._model
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", lambda **_: 1 / 0)
        with pytest.raises(ServeError, match="failed while generating"):
            runner.answer([5], _GREEDY)
    assert "a prompt could not be read" in caplog.text
    assert runner.answer([5], _GREEDY).num_tokens > 0
    runner.engine.check()


_LONG = Sampling(max_new_tokens=60, temperature=1.0, seed=3)


def _beside_a_running_answer(runner: _Runner, prompt_ids: list[int], sampling: Sampling) -> tuple[Any, Any]:
    """What comes of an answer that runs already and of one that joins it: a Delta or the exception."""

    async def scenario() -> Any:
        running = runner.engine.generate(Request("running", Prompt((5, 6)), _LONG))
        total = await anext(running)
        try:
            joined: Any = await asyncio.wait_for(_answer(runner.engine, prompt_ids, sampling), 20)
        except ServeError as error:
            joined = error
        async for delta in running:
            total = total + delta
        return total, joined

    return runner.run(scenario())


@pytest.mark.parametrize("tiny", [{"temperature": 1e-46}, {"temperature": 1e-30}, {"top_p": 1e-46}, {"top_p": 1e-30}])
def test_the_smallest_temperature_and_top_p_are_greedy_and_disturb_nobody(runner: _Runner, tiny: Any) -> None:
    greedy, undisturbed = runner.answer([7, 8], Sampling(6, temperature=0)), runner.answer([5, 6], _LONG)
    running, joined = _beside_a_running_answer(runner, [7, 8], Sampling(6, seed=1, **tiny))
    assert joined.text == greedy.text
    assert running.text == undisturbed.text


def test_what_fails_for_one_answer_ends_that_answer_only(runner: _Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty prompt fails in the forward pass, a full device while joining, a bad sampling when a token is chosen."""
    undisturbed = runner.answer([5, 6], _LONG)
    running, joined = _beside_a_running_answer(runner, [], _GREEDY)
    assert (running.text, type(joined)) == (undisturbed.text, ServeError)
    no_number: Any = "warm"
    running, joined = _beside_a_running_answer(runner, [7, 8], Sampling(6, temperature=no_number))
    assert (running.text, type(joined)) == (undisturbed.text, ServeError)
    join = SlotBatch.join

    def second_join_fails(batch: SlotBatch, cache: Any, shift: int = 0) -> None:
        if batch._cache.lengths:
            raise RuntimeError("out of memory")
        join(batch, cache)

    monkeypatch.setattr(SlotBatch, "join", second_join_fails)
    running, joined = _beside_a_running_answer(runner, [7, 8], _GREEDY)  # would wait for ever if it got lost
    assert (running.text, type(joined)) == (undisturbed.text, ServeError)
    runner.engine.check()


@pytest.mark.parametrize("broken", ["forward", "decode"])
def test_an_engine_that_fails_time_after_time_is_not_well(
    runner: _Runner, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    owner = runner.engine._started()._model if broken == "forward" else SlotBatch
    with monkeypatch.context() as patch:
        patch.setattr(owner, broken, lambda *_, **__: 1 / 0)
        for _ in range(3):
            runner.engine.check()
            with pytest.raises(ServeError, match="failed while generating"):
                runner.answer([5, 6], _GREEDY)
        with pytest.raises(ServeError, match="failed 3 times in a row"):
            runner.engine.check()
    runner.answer([5, 6], _GREEDY)
    runner.engine.check()


def test_numbers_that_overflowed_do_not_outlive_their_answer() -> None:
    """A NaN in a freed slot times the weight zero of a masked column is NaN: for the next row there, or one moved."""
    model = _model("llama", tie_word_embeddings=False)
    overflows = 63
    model.model.embed_tokens.weight.data[overflows] = float("inf")
    for leaving in (2, 1):  # the last row, whose slot a new row gets; one in between, to which the last row moves
        batch = open_batch(model)
        assert isinstance(batch, SlotBatch)
        with torch.inference_mode():
            for length in (40, 30, 30 if leaving == 2 else 5):
                _join(batch, model, tuple(range(length)))
            last = [7, 7, 7]
            last[leaving] = overflows
            assert not batch.decode(last)[leaving].isfinite().any()
            batch.leave(leaving)
            _join(batch, model, (5, 6, 7))
            assert batch.decode([7, 7, 7]).isfinite().all()


def _join(batch: SlotBatch, model: Any, prompt: tuple[int, ...]) -> None:
    prefill = Prefill(model, Prompt(prompt), None)
    assert prefill.advance() is not None
    batch.join(prefill.cache)


_RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    "rwkv": {"attention_hidden_size": 32},
    "recurrent_gemma": {"num_attention_heads": 4, "lru_width": 32, "attention_window_size": 8, "num_hidden_layers": 3},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 32},
}


@pytest.mark.parametrize("arch", _RECURRENT)
def test_a_model_that_does_not_answer_from_its_cache_is_refused(arch: str) -> None:
    from transformers import AutoConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "pad_token_id": 0}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2}
    if arch == "gpt_neo":
        del sizes["num_hidden_layers"]
    model = random_model(AutoConfig.for_model(arch, **sizes | _RECURRENT[arch]), seed=0).eval()
    with pytest.raises(ConfigError, match=rf"model=folder is a {arch} model, .* serve it with another engine"):
        prove(model, "folder", 256)


@pytest.mark.parametrize(("arch", "extra"), [("qwen3", {}), ("gpt2", {}), ("mistral", {"sliding_window": 8})])
def test_a_model_that_answers_from_its_cache_is_proved(arch: str, extra: Any) -> None:
    for max_model_len in (256, 20, 6, 4):
        prove(_model(arch, **extra), "folder", max_model_len)
    assert max(differences(_model(arch, **extra), 256)) < 1e-5


def test_the_proof_is_part_of_the_start(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "differences", lambda *_: [0.0, float("nan")])
    with pytest.raises(ConfigError, match="answers from a cache are not its own"):
        asyncio.run(Local(str(tiny_model_dir), EngineOptions(device="cpu")).start())


def test_a_closed_engine_says_so(tiny_model_dir: Path) -> None:
    runner = _Runner(str(tiny_model_dir), EngineOptions(max_concurrency=1, max_model_len=32, device="cpu"))
    assert runner.engine.max_model_len == 32
    runner.close()
    with pytest.raises(ServeError, match="ended"):
        runner.engine.check()


def test_a_length_beyond_the_model_is_refused(tiny_model_dir: Path) -> None:
    engine = Local(str(tiny_model_dir), EngineOptions(max_model_len=10**6))
    with pytest.raises(ConfigError, match="max_model_len=1000000 is more than the model was built for, 2048"):
        asyncio.run(engine.start())


@dataclass
class _Scripted:
    """Chooses the tokens of a script, whatever the model would."""

    ids: list[int]
    num: int = 0

    def __call__(self, _: torch.Tensor) -> int:
        self.num += 1
        return self.ids[self.num - 1]


_SAID = " is wide, größe\n 日本 🙂 and the sun is up"


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_told_as_what_follows_its_prompt(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Its text and that of its tokens, whole and streamed: no space is lost, and the offsets are those of the text."""
    shutil.copytree(tiny_model_dir, folder := tmp_path / "model")
    tokenizer = tokenizer_of(kind)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    prompt, ids = tokenizer.encode("the sea").ids, tokenizer.encode("the sea" + _SAID).ids
    assert ids[: len(prompt)] == prompt
    script = ids[len(prompt) :]
    runner = _Runner(str(folder), EngineOptions(device="cpu"))
    monkeypatch.setattr("rayswift.serving.local.loop.Sampler", lambda *_: _Scripted(script))
    prompts = PromptBuilder(load_tokenizer(str(folder)))
    app = build_asgi(ServeSpec(models={"m": "x"}), {"m": ServedModel(runner.engine, prompts, Admission(4, 4))})

    async def completed(**fields: Any) -> list[dict[str, Any]]:
        body = {"model": "m", "prompt": "the sea", "max_tokens": len(script), "logprobs": 3, **fields}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            reply = await client.post("/v1/completions", json=body)
        lines = [line[6:] for line in reply.text.split("\n") if line.startswith("data: {")] or [reply.text]
        return [json.loads(line)["choices"][0] for line in lines]

    try:
        for fields in ({}, {"stream": True}, {"stream": True, "stop": ["sun is down"]}):  # which holds text back
            parts = runner.run(completed(**fields))
            assert "".join(part["text"] for part in parts) == _SAID
            assert all("\ufffd" not in part["text"] for part in parts)
            told = [part["logprobs"] for part in parts if part["logprobs"]]
            tokens, at = ([one for part in told for one in part[key]] for key in ("tokens", "text_offset"))
            assert len(tokens) == len(script)
            assert "".join(token for token in tokens if token != "\ufffd") == _SAID
            assert all(
                _SAID[start:].startswith(token.rstrip("\ufffd")) for token, start in zip(tokens, at, strict=True)
            )
        assert prompts.answer_ids(_SAID) == script
        assert tokenizer.decode(prompt + prompts.answer_ids("sea")) == "the seasea"
    finally:
        runner.close()


def test_special_tokens_are_told_by_name_and_add_nothing(tiny_model_dir: Path) -> None:
    vocabulary = Vocabulary(lambda ids: "".join("ab"[i - 1] for i in ids if i), frozenset([9]), {0: "<s>", 9: "</s>"})
    loop = DecodeLoop(load_model(ModelSpec(path=str(tiny_model_dir))), vocabulary, 1)
    ticket = Ticket(Request("r", Prompt((1,)), Sampling(4, logprobs=2)), lambda _: None, vocabulary.decode)
    logits_V = torch.full((10,), -9.0)
    logits_V[[0, 9, 1]] = torch.tensor([3.0, 2.0, 1.0])
    (special,) = loop._logprobs(ticket, 0, logits_V)
    assert (special.token, special.is_special, special.num_chars) == ("<s>", True, 0)
    assert [text for text, _ in special.top] == ["<s>", "</s>"]
    (plain,) = loop._logprobs(ticket, 1, logits_V)
    assert (plain.token, plain.id, plain.num_chars) == ("a", 1, 1)
    assert loop._logprobs(ticket, 9, logits_V) == ()  # the end of the answer
