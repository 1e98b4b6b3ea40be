"""Vectors of the engine `local`: those of transformers, in any company, and what becomes of passes that fail."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertModel

from rayswift.errors import ConfigError, ServeError
from rayswift.models.loading import load_tokenizer
from rayswift.models.pooling import Pooling
from rayswift.serving.engine import Embedding, EngineOptions
from rayswift.serving.engines.local import Local
from rayswift.serving.local.embedding import Passes
from tests.embedding_cases import MAX_TOKENS, TEXTS, expected, make_bert, make_qwen3

torch.set_num_threads(1)


def _with(folder: Path, use: Callable[[Local], Coroutine[Any, Any, Any]], **options: Any) -> Any:
    async def scenario() -> Any:
        engine = Local(str(folder), EngineOptions(device="cpu", **options))
        await engine.start()
        try:
            return await use(engine)
        finally:
            await engine.close()

    return asyncio.run(scenario())


async def _together(engine: Local, texts: Any, num_dims: int | None = None) -> np.ndarray:
    tokenizer = load_tokenizer(engine._folder)
    return np.stack(await asyncio.gather(*[engine.embed(tokenizer(text)["input_ids"], num_dims) for text in texts]))


@pytest.mark.parametrize(("mode", "pooled"), [("mean_tokens", "mean"), ("cls_token", "cls")])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_model_that_reads_both_ways(tmp_path: Path, tiny_text: Path, mode: str, pooled: str, normalize: bool) -> None:
    folder = make_bert(tmp_path / "m", tiny_text, mode=mode, normalize=normalize)

    async def use(engine: Local) -> np.ndarray:
        assert engine.embedding == Embedding(64)
        assert engine.max_model_len == MAX_TOKENS
        engine.check()
        return await _together(engine, TEXTS * 5)

    found = _with(folder, use, max_concurrency=3)
    assert found.dtype == np.float32
    assert np.abs(found - np.tile(expected(folder, TEXTS, pooled, normalize=normalize), (5, 1))).max() < 1e-5


def test_a_causal_model_and_vectors_that_are_cut(tmp_path: Path, tiny_text: Path) -> None:
    folder = make_qwen3(tmp_path / "m", tiny_text, is_matryoshka=True)

    async def use(engine: Local) -> tuple[np.ndarray, np.ndarray]:
        assert engine.embedding == Embedding(64, is_matryoshka=True)
        return await _together(engine, TEXTS), await _together(engine, TEXTS, 16)

    whole, cut = _with(folder, use)
    assert np.abs(whole - expected(folder, TEXTS, "last")).max() < 1e-5
    assert np.abs(cut - expected(folder, TEXTS, "last", num_dims=16)).max() < 1e-5
    assert np.allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-6)


def test_what_cannot_be_loaded_is_told_at_start(tmp_path: Path, tiny_text: Path) -> None:
    folder = make_bert(tmp_path / "m", tiny_text)

    async def nothing(_: Local) -> None:
        return None

    with pytest.raises(ConfigError, match=f"max_model_len=64 is more than the model reads, {MAX_TOKENS}"):
        _with(folder, nothing, max_model_len=64)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match=r"lacks \d+ weights"):
        _with(folder, nothing)


def test_a_model_that_sees_the_padding_is_refused(
    tmp_path: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, forward = make_bert(tmp_path / "m", tiny_text), BertModel.forward

    def unmasked(self: Any, *args: Any, attention_mask: Any, **kwargs: Any) -> Any:
        return forward(self, *args, attention_mask=torch.ones_like(attention_mask), **kwargs)

    monkeypatch.setattr(BertModel, "forward", unmasked)
    with pytest.raises(ConfigError, match="another vector beside a longer one"):
        _with(folder, lambda engine: engine.close())


class _Recorded:
    """In place of an encoder: a text's vector is its length; notes what went together; fails when told to."""

    pooling, embedding = Pooling("mean", normalize=False), Embedding(1)

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.failing = False

    def vectors(self, texts: Any) -> np.ndarray:
        if self.failing:
            raise RuntimeError("out of memory")
        self.batches.append([len(ids) for ids in texts])
        return np.array([[len(ids)] for ids in texts], dtype=np.float32)


def test_texts_that_wait_share_passes_within_bounds() -> None:
    async def scenario() -> list[list[int]]:
        passes = Passes(encoder := _Recorded(), 3)  # type: ignore[arg-type]
        lengths = [1, 2, 3, 4, 9000, 9001, 5]
        found = await asyncio.gather(*[passes.vector(range(length), None) for length in lengths])
        assert [int(one[0]) for one in found] == lengths
        await passes.close()
        return encoder.batches

    assert asyncio.run(scenario()) == [[1, 2, 3], [4], [9000], [9001], [5]]


def test_a_failed_pass_is_told_to_its_texts_alone_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        passes = Passes(encoder := _Recorded(), 8)  # type: ignore[arg-type]
        encoder.failing = True
        found = await asyncio.gather(*[passes.vector([1], None) for _ in range(2)], return_exceptions=True)
        assert [type(one) for one in found] == [ServeError, ServeError]
        assert passes.num_failures == 1
        encoder.failing = False
        left = asyncio.create_task(passes.vector([1, 1], None))
        await asyncio.sleep(0)
        left.cancel()
        assert (await passes.vector([1], None)).tolist() == [1]
        assert passes.num_failures == 0
        assert encoder.batches == [[1]], "nobody waited for the other any more"
        await passes.close()

    asyncio.run(scenario())
    assert "out of memory" in caplog.text
