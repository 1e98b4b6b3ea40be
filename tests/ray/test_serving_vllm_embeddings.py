"""Embedding models in the real vLLM behind the endpoint: transformers' own vectors over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from rayswift.serving.app import RunningEndpoint, serve_in_background
from rayswift.serving.spec import ServeSpec
from tests.embedding_cases import MAX_TOKENS, TEXTS, expected, make_bert, make_qwen3
from tests.vllm_cases import MARKS

pytestmark = MARKS
_MODES = {"bert": "mean", "causal": "last"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path) -> dict[str, Path]:
    """By the name each is served under: a BERT, and a Qwen3 whose vectors may be cut."""
    root = tmp_path_factory.mktemp("embedding")
    return {
        "bert": make_bert(root / "bert", tiny_text),
        "causal": make_qwen3(root / "causal", tiny_text, matryoshka_dimensions=[16, 32]),
    }


@pytest.fixture(scope="module")
def endpoint(
    folders: dict[str, Path], serving_ray: Callable[[], AbstractContextManager[int]]
) -> Iterator[RunningEndpoint]:
    models = {name: str(folder) for name, folder in folders.items()}
    with serving_ray() as port:
        spec = ServeSpec(models=models, port=port, max_concurrency=8, max_queued=24, kv_cache_bytes=2**27)
        with serve_in_background(spec) as running:
            yield running


@pytest.fixture
def client(endpoint: RunningEndpoint) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=endpoint.url, api_key="none", max_retries=0, timeout=60) as made:
        yield made


def _vectors(client: openai.OpenAI, model: str, texts: Any, **fields: Any) -> np.ndarray:
    reply = client.embeddings.create(model=model, input=texts, **fields)
    assert [one.index for one in reply.data] == list(range(len(reply.data)))
    return np.array([one.embedding for one in reply.data], dtype=np.float32)


@pytest.mark.parametrize("name", _MODES)
def test_vectors_are_those_of_transformers_in_any_company(
    client: openai.OpenAI, folders: dict[str, Path], name: str
) -> None:
    want = expected(folders[name], TEXTS, _MODES[name])
    assert np.abs(want[0] - want[1]).max() > 0.01, "a model that tells texts apart"
    assert np.abs(_vectors(client, name, list(TEXTS)) - want).max() < 1e-4
    alone = np.concatenate([_vectors(client, name, text, encoding_format="float") for text in TEXTS])
    assert np.abs(alone - want).max() < 1e-4
    with ThreadPoolExecutor(4) as pool:
        many = list(pool.map(lambda _: _vectors(client, name, list(TEXTS) * 5), range(4)))
    assert max(np.abs(one - np.tile(want, (5, 1))).max() for one in many) < 1e-4


def test_vectors_are_cut_where_the_model_says_so(client: openai.OpenAI, folders: dict[str, Path]) -> None:
    want = expected(folders["causal"], TEXTS, "last", num_dims=16)
    assert np.abs(_vectors(client, "causal", list(TEXTS), dimensions=16) - want).max() < 1e-4
    for model, dimensions in (("causal", 17), ("bert", 16)):
        with pytest.raises(openai.BadRequestError, match="dimensions"):
            _vectors(client, model, "a", dimensions=dimensions)


def test_the_longest_text_is_read_and_a_longer_one_refused(client: openai.OpenAI) -> None:
    for model in _MODES:
        assert np.isfinite(_vectors(client, model, [[5] * MAX_TOKENS])).all()
        with pytest.raises(openai.BadRequestError, match=f"maximum context length is {MAX_TOKENS} tokens"):
            _vectors(client, model, [[5] * (MAX_TOKENS + 1)])


def test_it_does_not_talk(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="makes vectors; use /v1/embeddings"):
        client.chat.completions.create(model="bert", messages=[{"role": "user", "content": "hi"}])
    assert {(model.model_extra or {})["task"] for model in client.models.list()} == {"embed"}
