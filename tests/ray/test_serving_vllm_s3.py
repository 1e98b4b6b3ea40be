"""Adapters of an object store beside a model of the real vLLM: fetched by the replica, in its own environment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from rayswift.config.job import AdapterSpec
from rayswift.models.adapters import add_lora, load_base, save_adapter
from rayswift.models.init import init_model
from rayswift.serving.app import serve_in_background
from rayswift.serving.spec import ServeSpec
from tests.s3_cases import s3_bucket
from tests.vllm_cases import MARKS

pytestmark = MARKS


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A private store. Ray's processes have its address and credentials from the environment alone."""
    yield from s3_bucket(monkeypatch)


@pytest.fixture
def base(tmp_path: Path, tiny_text: Path) -> Path:
    """A Qwen3 of heads that vLLM's attention on a CPU has a kernel for."""
    init_model(
        str(tmp_path / "base"), arch="qwen3", layers=2, hidden_size=128, heads=4, kv_heads=2, vocab_size=512,
        train_tokenizer_files=[str(tiny_text)], seed=0,
    )  # fmt: skip
    return tmp_path / "base"


def upload(bucket: Any, base: Path, folder: Path, seed: int) -> None:
    """Write `adapters/one` into the store: an adapter that changes what the model says, another one per seed."""
    model = add_lora(load_base(str(base)), AdapterSpec(name="lora", rank=8, alpha=64), seed=seed)
    torch.manual_seed(seed)
    for weight, values in model.named_parameters():
        if "lora_B" in weight:
            torch.nn.init.normal_(values, std=0.05)
    save_adapter(model, folder, base=str(base))
    for file in sorted(folder.iterdir()):
        bucket.put_file(str(file), f"bucket/adapters/one/{file.name}")


def until(holds: Callable[[], bool], limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.2)


def test_adapters_of_an_object_store_answer_by_name(
    bucket: Any, base: Path, tmp_path: Path, serving_ray: Callable[[], AbstractContextManager[int]]
) -> None:
    upload(bucket, base, tmp_path / "first", 1)
    with serving_ray() as port:
        spec = ServeSpec(
            models={"base": str(base)}, adapters={"base": "s3://bucket/adapters"}, port=port, max_concurrency=4,
            max_queued=4, max_model_len=256, kv_cache_bytes=2**28,
        )  # fmt: skip
        with (
            serve_in_background(spec) as running,
            openai.OpenAI(base_url=running.url, api_key="none", max_retries=0, timeout=60) as client,
        ):
            _check(client, lambda seed: upload(bucket, base, tmp_path / "second", seed))


def _check(client: openai.OpenAI, write_again: Callable[[int], None]) -> None:
    def said(model: str) -> str:
        return client.completions.create(model=model, prompt="import os", max_tokens=8, temperature=0).choices[0].text

    first = said("base:one")
    assert first != said("base")
    assert first == said("base:one")
    until(lambda: "base:one" in {model.id for model in client.models.list()})
    for name in ("absent", "../base", "one/../../base"):
        with pytest.raises(openai.NotFoundError):
            said(f"base:{name}")
    write_again(2)
    until(lambda: said("base:one") != first)
    assert said("base:one") != said("base")
