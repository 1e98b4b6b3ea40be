"""Promotion with vLLM as the engine, under load: forth, back by hand, and back by itself; no request lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rayswift.models.init import init_model
from rayswift.serving.versions import VERSION_HEADER
from tests import vllm_cases
from tests.promotion_cases import Endpoint, Load, run, serving, until, write_exports, write_spec

pytestmark = vllm_cases.MARKS
_QUICK = ("--steps", "0.3,1", "--step-seconds", "2", "--min-requests", "5", "--max-latency-ratio", "20")


@pytest.fixture(scope="module")
def endpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_text: Path, free_port: Callable[[], int]
) -> Iterator[Endpoint]:
    root, port = tmp_path_factory.mktemp("promoted"), free_port()
    init_model(
        str(root / "m"), arch="qwen3", layers=2, hidden_size=128, heads=4, kv_heads=2, vocab_size=512,
        train_tokenizer_files=[str(tiny_text)], seed=0,
    )  # fmt: skip
    exports = write_exports(root / "m", root)
    spec = write_spec(root, {"m": exports / "one"}, port, "vllm", kv_cache_bytes=vllm_cases.KV_BYTES)
    with serving(root, spec):
        yield Endpoint(f"http://127.0.0.1:{port}/v1", exports)


def test_traffic_goes_to_a_version_and_back_by_hand_without_a_lost_request(endpoint: Endpoint, tmp_path: Path) -> None:
    old, new = endpoint.version("one"), endpoint.version("two")
    assert endpoint.ask().headers[VERSION_HEADER] == old
    with Load(endpoint) as load:
        code, said = run(tmp_path, "promote", str(endpoint.exports / "two"), *_QUICK, "--min-agreement", "1")
        assert code == 0, said
        assert endpoint.served() == {new: 1.0}
        assert endpoint.state("two")[0] == "live"
        assert endpoint.ask().headers[VERSION_HEADER] == new
        assert load.seen[new]
        code, said = run(tmp_path, "rollback", str(endpoint.exports))
        assert code == 0, said
        before = load.seen[old]
        until(lambda: load.seen[old] > before + 3, "the old version answers again")
    assert not load.lost
    assert set(load.seen) == {old, new}
    assert endpoint.served() == {old: 1.0}
    assert endpoint.state("two") == ("rolled-back", "by hand")
    assert endpoint.ask().headers[VERSION_HEADER] == old


def test_a_worse_version_goes_back_by_itself_before_anybody_is_sent_to_it(endpoint: Endpoint, tmp_path: Path) -> None:
    old = endpoint.version("one")
    with Load(endpoint) as load:
        code, said = run(tmp_path, "promote", str(endpoint.exports / "noisy"), *_QUICK, "--min-agreement", "0.9")
    assert code == 5, said
    assert "of its greedy answers are the live version's" in said
    assert set(load.seen) == {old}
    assert not load.lost
    assert endpoint.served() == {old: 1.0}
    assert endpoint.state("noisy")[0] == "rolled-back"
