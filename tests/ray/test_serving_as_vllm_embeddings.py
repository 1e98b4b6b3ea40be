"""Vectors of our endpoint beside those of vLLM's own server over the same folder, asked by the official client."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tests import vllm_cases
from tests.embedding_cases import MAX_TOKENS, TEXTS, make_qwen3
from tests.vllm_cases import Pair, both

pytestmark = vllm_cases.MARKS


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_text: Path,
    free_port: Callable[[], int],
    serving_ray: Callable[[], AbstractContextManager[int]],
) -> Iterator[Pair]:
    root = tmp_path_factory.mktemp("vectors")
    folder = make_qwen3(root / "m", tiny_text, matryoshka_dimensions=[16, 32])
    with vllm_cases.pair_over(folder, root / "log", free_port(), serving_ray, None, ("--runner", "pooling")) as made:
        yield made


def _vectors(client: openai.OpenAI, given: Any, **fields: Any) -> tuple[np.ndarray, tuple[Any, ...]]:
    """The vectors, and what is said of them."""
    reply = client.embeddings.create(model="m", input=given, **fields)
    said = (reply.object, [(one.object, one.index) for one in reply.data], reply.usage.prompt_tokens,
            reply.usage.total_tokens)  # fmt: skip
    found = [
        np.frombuffer(base64.b64decode(one.embedding), "<f4") if isinstance(one.embedding, str) else one.embedding
        for one in reply.data
    ]
    return np.array(found, dtype=np.float32), said


@pytest.mark.parametrize("fields", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}], ids=str)
@pytest.mark.parametrize(
    "given", [TEXTS[0], list(TEXTS), [5, 6, 7], [[5, 6, 7], [8, 9, 10, 11]]], ids=["text", "texts", "ids", "several"]
)
def test_vectors_are_the_same_in_each_format(pair: Pair, given: Any, fields: dict[str, Any]) -> None:
    (ours, our_words), (theirs, their_words) = (_vectors(client, given, **fields) for client in pair)
    assert our_words == their_words
    assert np.abs(ours - theirs).max() < 1e-5
    assert np.linalg.norm(ours, axis=1) == pytest.approx(np.ones(len(ours)), abs=1e-5)


@pytest.mark.parametrize("fields", [{}, {"encoding_format": "base64"}], ids=str)
def test_vectors_are_cut_alike(pair: Pair, fields: dict[str, Any]) -> None:
    ours, theirs = (_vectors(client, list(TEXTS), dimensions=16, **fields)[0] for client in pair)
    assert ours.shape == (len(TEXTS), 16)
    assert np.abs(ours - theirs).max() < 1e-5


@pytest.mark.parametrize(
    "fields",
    [{"dimensions": 17}, {"dimensions": 0}, {"encoding_format": "int"}, {"input": [[5] * (MAX_TOKENS + 1)]},
     {"input": []}, {"input": [[999_999]]}],
    ids=str,
)  # fmt: skip
def test_what_theirs_refuses_ours_refuses_too(pair: Pair, fields: dict[str, Any]) -> None:
    def ask(client: openai.OpenAI) -> int:
        with pytest.raises(openai.APIStatusError) as refused:
            client.embeddings.create(**({"model": "m", "input": "a"} | fields))
        return refused.value.status_code

    assert both(pair, ask) == 400
