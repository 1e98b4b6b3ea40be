"""Adapters by name: from a local folder, and copied from a storage when it is there or was written again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest

from rayswift.models.adapters import weights_sha256
from rayswift.serving import app
from rayswift.serving.adapter_store import AdapterStore, packed_in_training
from rayswift.serving.api_errors import ApiError
from rayswift.serving.engine import Adapter, Refused
from rayswift.serving.spec import ServeSpec
from rayswift.serving.vllm.adapters import Adapters


def _write(folder: Path, weights: bytes = b"one") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "rayswift_base.json").write_text("{}")


def test_a_local_folder_is_used_where_it_lies(tmp_path: Path) -> None:
    _write(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    store = AdapterStore(str(tmp_path))
    assert store.find("good").folder == str((tmp_path / "good").resolve())
    assert store.names() == ["good"]
    for name in ("absent", "../good", "", "good/../good", "/etc"):
        with pytest.raises(ApiError, match="does not exist"):
            store.find(name)


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
    for name, packed in (("plain", {}), ("packed", {"quantization": "nf4"})):
        _write(tmp_path / name)
        binding = {"base": "b", "base_sha256": weights_sha256(tiny_model_dir), **packed}
        (tmp_path / name / "rayswift_base.json").write_text(json.dumps(binding))
        adapters._check(Adapter(name, str(tmp_path / name)))
    (record,) = caplog.records
    assert record.getMessage().startswith("the adapter packed was trained on a base in nf4 and served on its stored")


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
    weights = Path(store.find("team/a").folder) / "adapter_model.safetensors"
    assert weights.read_bytes() == b"first"
    inode = weights.stat().st_ino
    store.find("team/a")
    assert weights.stat().st_ino == inode  # not fetched again
    _upload(bucket, "team/a", b"second one")
    store.find("team/a")
    assert weights.read_bytes() == b"first"  # it was looked at just now
    monkeypatch.setattr("rayswift.serving.adapter_store.LOOK_EVERY_S", 0.0)
    assert (Path(store.find("team/a").folder) / "adapter_model.safetensors").read_bytes() == b"second one"


@pytest.mark.parametrize("name", ["absent", "../adapters/a", "a/b/c/d/e", ".hidden", "a\x00"])
def test_a_storage_has_no_other_names(bucket: Any, name: str) -> None:
    _upload(bucket, "a", b"x")
    with pytest.raises(ApiError) as caught:
        AdapterStore("memory://adapters").find(name)
    assert caught.value.status == 404


def test_an_adapter_too_large_to_fetch_is_refused(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayswift.serving.adapter_store._MAX_BYTES", 10)
    _upload(bucket, "a", b"x" * 11)
    with pytest.raises(Refused, match="larger"):
        AdapterStore("memory://adapters").find("a")
