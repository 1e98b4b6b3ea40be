"""Adapters by name: from a local folder, and copied from a storage when it is there or was written again.

A storage that does not answer holds up who asks for what is not copied, to the end of its time, and nobody else.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import httpx
import pytest

from rayswift.config.job import AdapterSpec
from rayswift.models.adapters import add_lora, load_base, save_adapter, weights_sha256
from rayswift.models.loading import load_tokenizer
from rayswift.serving import adapter_store, app
from rayswift.serving.adapter_store import AdapterStore, packed_in_training
from rayswift.serving.admission import Admission
from rayswift.serving.api_errors import ApiError
from rayswift.serving.engine import Adapter, FakeEngine, Refused
from rayswift.serving.http import build_asgi
from rayswift.serving.prompts import PromptBuilder
from rayswift.serving.served import ServedModel
from rayswift.serving.spec import ServeSpec
from rayswift.serving.vllm.adapters import Adapters


def _write(folder: Path, weights: bytes = b"one") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "rayswift_base.json").write_text("{}")


def found(store: AdapterStore, name: str) -> Adapter:
    return asyncio.run(store.find(name))


def test_a_local_folder_is_used_where_it_lies(tmp_path: Path) -> None:
    _write(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    store = AdapterStore(str(tmp_path))
    assert found(store, "good").folder == str((tmp_path / "good").resolve())
    assert store.names() == ["good"]
    for name in ("absent", "../good", "", "good/../good", "/etc"):
        with pytest.raises(ApiError, match="does not exist"):
            found(store, name)


def test_adapters_of_a_base_in_4_bits_are_told_at_the_start_with_what_to_do(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "adapters"
    for name in ("plain", "packed", "packed-too", "broken"):
        _write(root / name)
    for name in ("packed", "packed-too"):
        (root / name / "rayswift_base.json").write_text(json.dumps({"quantization": "nf4", "dtype": "bfloat16"}))
    (root / "broken" / "rayswift_base.json").write_text("{")
    assert packed_in_training(str(root)) == {"packed": "nf4", "packed-too": "nf4"}
    spec = ServeSpec(models={"m": str(tiny_model_dir)}, adapters={"m": str(root)}, engine="vllm")
    app._with_checked_models(spec)
    (note,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert note.startswith(f"note: adapters.m={root}: packed, packed-too: trained on a base in nf4 and served on its")
    assert "answers are not those of the trained model" in note
    assert "export the run merged (rayswift export RUN FOLDER)" in note
    shutil.rmtree(root / "packed")
    shutil.rmtree(root / "packed-too")
    app._with_checked_models(spec)
    assert "note:" not in capsys.readouterr().err


def test_a_replica_says_so_of_an_adapter_that_it_loads(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapters = Adapters(str(tiny_model_dir), pad_base=False)
    trained = add_lora(load_base(str(tiny_model_dir)), AdapterSpec(rank=2), seed=0)
    for name, packed in (("plain", {}), ("packed", {"quantization": "nf4"})):
        save_adapter(trained, tmp_path / name, base=str(tiny_model_dir))
        binding = {"base": "b", "base_sha256": weights_sha256(tiny_model_dir), **packed}
        (tmp_path / name / "rayswift_base.json").write_text(json.dumps(binding))
        adapters._check(Adapter(name, str(tmp_path / name)))
    (record,) = caplog.records
    assert record.getMessage().startswith("the adapter packed was trained on a base in nf4 and served on its stored")


def test_an_adapter_of_other_sizes_is_refused_before_vllm_sees_it_and_only_the_log_says_why(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapters = Adapters(str(tiny_model_dir), pad_base=False)
    save_adapter(
        add_lora(load_base(str(tiny_model_dir)), AdapterSpec(rank=4), seed=0), tmp_path / "a", base=str(tiny_model_dir)
    )
    config = tmp_path / "a/adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 8'))
    with pytest.raises(Refused, match=r"^the adapter a does not fit this model$"):
        adapters._check(Adapter("a", str(tmp_path / "a")))
    (record,) = caplog.records
    assert "of shape [4, 128] in adapter_model.safetensors" in record.getMessage()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "rayswift_base.json"])
def test_an_adapter_is_loaded_again_when_any_of_its_files_was_written_again(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    _write(tmp_path / "a")
    loads: list[int] = []

    async def loaded(*_: Any) -> int:
        loads.append(len(loads))
        return loads[-1]

    adapters, adapter = Adapters(str(tiny_model_dir), pad_base=False), Adapter("a", str(tmp_path / "a"))
    monkeypatch.setattr(adapters, "_loaded", loaded)
    assert [asyncio.run(adapters.request(None, adapter)) for _ in range(2)] == [0, 0]
    (tmp_path / "a" / name).write_text('{"lora_alpha": 64}  ')
    assert asyncio.run(adapters.request(None, adapter)) == 1
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(Refused, match="not complete"):
        asyncio.run(adapters.request(None, adapter))


@pytest.fixture
def bucket() -> Any:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()


def _upload(fs: Any, name: str, weights: bytes) -> None:
    fs.pipe(f"/adapters/{name}/adapter_config.json", json.dumps({"peft_type": "LORA"}).encode())
    fs.pipe(f"/adapters/{name}/rayswift_base.json", b"{}")
    fs.pipe(f"/adapters/{name}/adapter_model.safetensors", weights)


def test_a_storage_is_copied_from_and_asked_again_for_what_changed(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _upload(bucket, "team/a", b"first")
    store = AdapterStore("memory://adapters")
    weights = Path(found(store, "team/a").folder) / "adapter_model.safetensors"
    assert weights.read_bytes() == b"first"
    inode = weights.stat().st_ino
    found(store, "team/a")
    assert weights.stat().st_ino == inode  # not fetched again
    _upload(bucket, "team/a", b"second one")
    found(store, "team/a")
    assert weights.read_bytes() == b"first"  # it was looked at just now
    monkeypatch.setattr(adapter_store, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(adapter_store, "_REFRESH_S", 60.0)
    assert (Path(found(store, "team/a").folder) / "adapter_model.safetensors").read_bytes() == b"second one"


@pytest.mark.parametrize("name", ["absent", "../adapters/a", "a/b/c/d/e", ".hidden", "a\x00"])
def test_a_storage_has_no_other_names(bucket: Any, name: str) -> None:
    _upload(bucket, "a", b"x")
    with pytest.raises(ApiError) as caught:
        found(AdapterStore("memory://adapters"), name)
    assert caught.value.status == 404


def test_an_adapter_too_large_to_fetch_is_refused(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayswift.serving.adapter_store._MAX_BYTES", 10)
    _upload(bucket, "a", b"x" * 11)
    with pytest.raises(Refused, match="larger"):
        found(AdapterStore("memory://adapters"), "a")


class _Silent:
    """Makes a storage tell nothing of some adapters for as long as `holds`, and counts how often each is asked for."""

    def __init__(self, fs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names, self.asked, self._released, self._own = set[str](), list[str](), threading.Event(), fs.info
        # of its class: fsspec makes an instance for each thread
        monkeypatch.setattr(type(fs), "info", lambda _, path, **kwargs: self._info(path, **kwargs))

    def _info(self, path: str, **kwargs: Any) -> Any:
        name = path.split("/")[-2]
        self.asked.append(name)
        if name in self.names:
            assert self._released.wait(60)
        return self._own(path, **kwargs)

    def release(self) -> None:
        self._released.set()


@pytest.fixture
def silent(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Silent]:
    one = _Silent(bucket, monkeypatch)
    yield one
    one.release()


def _app(folder: Path, **spec: Any) -> Any:
    served = ServedModel(FakeEngine(), PromptBuilder(load_tokenizer(str(folder))), Admission(4, 4))
    return build_asgi(ServeSpec(models={"m": "unused"}, adapters={"m": "memory://adapters"}, **spec), {"m": served})


def _client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=30)


async def _ask(client: httpx.AsyncClient, model: str) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
    return await client.post("/v1/chat/completions", json=body)


def test_a_silent_storage_holds_up_only_who_asks_for_what_is_not_copied(
    tiny_model_dir: Path, bucket: Any, silent: _Silent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_store, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(adapter_store, "_REFRESH_S", 0.2)
    hung = [f"hung{i}" for i in range(6)]  # more than are looked for at once
    for name in ("a", *hung):
        _upload(bucket, name, b"x")

    async def scenario() -> None:
        async with _client(_app(tiny_model_dir, request_timeout_s=5)) as client:
            assert (await _ask(client, "m:a")).status_code == 200
            silent.names.update((*hung, "a"))
            asking = [asyncio.create_task(_ask(client, f"m:{name}")) for name in (*hung, *hung)]
            async with asyncio.timeout(30):
                while len(set(silent.asked) & set(hung)) < 4:
                    await asyncio.sleep(0.01)
            answers = [await _ask(client, model) for model in ("m", "m:a", "m:a", "m")]
            assert [one.status_code for one in answers] == [200] * 4
            assert not any(task.done() for task in asking), "the storage did not hold them up"
            show = asyncio.create_task(client.get("/v1/models/m:hung0"))
            for answer in (*(await asyncio.gather(*asking)), await show):
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "timeout")
            assert max(silent.asked.count(name) for name in hung) == 1  # one search for all who ask
            silent.release()
            assert (await _ask(client, "m:hung0")).status_code == 200

    asyncio.run(scenario())


def test_who_leaves_is_not_waited_with(tiny_model_dir: Path, bucket: Any, silent: _Silent) -> None:
    _upload(bucket, "hung", b"x")
    silent.names.add("hung")
    content = json.dumps({"model": "m:hung", "messages": [{"role": "user", "content": "hi"}]}).encode()
    left = iter([{"type": "http.request", "body": content}, {"type": "http.disconnect"}])
    headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers, "query_string": b""}
    sent: list[Any] = []

    async def receive() -> Any:
        return next(left)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(asyncio.wait_for(_app(tiny_model_dir)(scope, receive, send), 20))
    assert sent[0]["status"] == 499


def test_a_name_that_is_not_there_is_not_asked_for_again_at_once(
    bucket: Any, silent: _Silent, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AdapterStore("memory://adapters")
    for _ in range(5):
        with pytest.raises(ApiError, match="does not exist"):
            found(store, "later")
    assert silent.asked == ["later"]
    _upload(bucket, "later", b"x")
    monkeypatch.setattr(adapter_store.time, "monotonic", lambda now=adapter_store.time.monotonic: now() + 6)
    assert found(store, "later").name == "later"


def test_only_so_many_names_are_looked_for(bucket: Any, silent: _Silent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_store, "_MAX_LOOKS", 2)
    silent.names.update("ab")

    async def scenario() -> None:
        store = AdapterStore("memory://adapters")
        waiting = [asyncio.create_task(store.find(name)) for name in "ab"]
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="does not answer") as caught:
            await store.find("c")
        assert caught.value.status == 503
        silent.release()
        for task in waiting:
            with pytest.raises(ApiError, match="does not exist"):
                await task
        with pytest.raises(ApiError, match="does not exist"):
            await store.find("c")

    asyncio.run(scenario())


def test_only_so_many_requests_wait_for_what_is_not_copied(
    bucket: Any, silent: _Silent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve counts each of them among those that the replica answers, and leaves the others before its door."""
    monkeypatch.setattr(adapter_store, "_MAX_WAITING", 2)
    silent.names.add("a")

    async def scenario() -> None:
        store = AdapterStore("memory://adapters")
        waiting = [asyncio.create_task(store.find("a")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="does not answer") as caught:
            await store.find("a")
        assert caught.value.status == 503
        waiting[0].cancel()
        await asyncio.wait(waiting[:1])
        waiting.append(asyncio.create_task(store.find("a")))
        await asyncio.sleep(0)
        silent.release()
        for task in waiting[1:]:
            with pytest.raises(ApiError, match="does not exist"):
                await task

    asyncio.run(scenario())


def test_any_number_may_wait_for_a_folder_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which answers: what bounds them is the model's own queue."""
    monkeypatch.setattr(adapter_store, "_MAX_WAITING", 2)
    monkeypatch.setattr(adapter_store, "find_adapter", lambda root, name: root / name)

    async def scenario() -> list[str]:
        store = AdapterStore(str(tmp_path))
        return [one.folder for one in await asyncio.gather(*(store.find("a") for _ in range(20)))]

    assert asyncio.run(scenario()) == [str(tmp_path / "a")] * 20
