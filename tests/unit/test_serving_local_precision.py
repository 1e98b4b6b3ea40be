"""The type a CPU computes in: float32 where it has no arithmetic for the stored one, if memory allows."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rayswift.models.loading import load_model
from rayswift.serving.engine import EngineOptions
from rayswift.serving.engines.local import Local
from rayswift.serving.local import precision

_AVX2 = {"architecture": "x86_64", "avx2": True, "avx512_bw": False, "avx512_fp16": False}


@pytest.fixture
def avx2(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found = dict(_AVX2)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    return found


@pytest.fixture(params=[torch.bfloat16, torch.float16])
def half_dir(request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path: Path) -> Path:
    from rayswift.config.job import ModelSpec

    model = load_model(ModelSpec(path=str(tiny_model_dir)), dtype=request.param)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_model_dir / name).read_bytes())
    return tmp_path


def _dtype_of(folder: Path, dtype: str = "auto") -> torch.dtype:
    """In which an engine that was started computes."""

    async def scenario() -> torch.dtype:
        engine = Local(str(folder), EngineOptions(device="cpu", dtype=dtype))
        await engine.start()
        found: torch.dtype = engine._started()._model.dtype
        await engine.close()
        return found

    return asyncio.run(scenario())


def test_a_half_type_without_arithmetic_is_computed_in_float32(half_dir: Path, avx2: dict[str, Any]) -> None:
    stored = _stored(half_dir)
    assert _dtype_of(half_dir) == torch.float32
    assert _dtype_of(half_dir, str(stored).removeprefix("torch.")) == stored  # asked for by name
    avx2 |= {"avx512_bw": True, "avx512_fp16": True}
    assert precision.dtype_for_cpu(str(half_dir)) is None
    avx2 |= _AVX2 | {"architecture": "aarch64"}
    assert precision.dtype_for_cpu(str(half_dir)) is None


def _stored(folder: Path) -> torch.dtype:
    from rayswift.models.loading import load_config

    dtype: torch.dtype = load_config(str(folder)).dtype
    return dtype


@pytest.mark.usefixtures("avx2")
def test_what_would_not_fit_stays_as_stored(
    half_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    size = sum(file.stat().st_size for file in half_dir.glob("*.safetensors"))
    monkeypatch.setattr(precision, "memory_left", lambda: 4 * size + 2)
    assert precision.dtype_for_cpu(str(half_dir)) == torch.float32
    monkeypatch.setattr(precision, "memory_left", lambda: 4 * size - 2)
    assert precision.dtype_for_cpu(str(half_dir)) is None
    assert "has no arithmetic for" in caplog.text


@pytest.mark.usefixtures("avx2")
def test_float32_stays_float32(tiny_model_dir: Path) -> None:
    assert precision.dtype_for_cpu(str(tiny_model_dir)) is None


@pytest.mark.parametrize(
    ("limit", "left"), [("3000\n", 1200), ("max\n", 5000), ("9000\n", 5000), ("1000\n", 0), (None, 5000)]
)
def test_what_a_container_has_left_counts(
    limit: str | None, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision.psutil, "virtual_memory", lambda: SimpleNamespace(available=5000))
    monkeypatch.setattr(precision, "_CGROUP", tmp_path)
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("2000\n")
        (tmp_path / "memory.stat").write_text("anon 1800\ninactive_file 200\nactive_file 0\n")
    assert precision.memory_left() == left


@pytest.mark.usefixtures("avx2")
def test_quantized_weights_stay_as_stored(half_dir: Path) -> None:
    config = json.loads((half_dir / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": {}}
    (half_dir / "config.json").write_text(json.dumps(config))
    assert precision.dtype_for_cpu(str(half_dir)) is None
