"""What a model's folder wishes of answers is read as `vllm serve` reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rayswift.serving.defaults import SamplingDefaults
from rayswift.serving.engine import Sampling


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "m"))


def _with(folder: Path, **wishes: Any) -> SamplingDefaults:
    (folder / "generation_config.json").write_text(json.dumps(wishes))
    return SamplingDefaults.of(folder)


def test_a_folder_without_wishes(folder: Path) -> None:
    assert _with(folder, eos_token_id=1) == SamplingDefaults()
    (folder / "generation_config.json").unlink()
    assert SamplingDefaults.of(folder) == SamplingDefaults()


def test_what_a_folder_wishes(folder: Path) -> None:
    found = _with(folder, do_sample=True, temperature=0.6, top_p=0.95, top_k=20, min_p=0.05, repetition_penalty=1.05)
    assert found == SamplingDefaults(0.6, 0.95, 20, 0.05, repetition_penalty=1.05)
    assert _with(folder, max_new_tokens=2048).max_new_tokens == 2048
    assert found.greedy(9) == Sampling(9, temperature=0, repetition_penalty=1.05)


def test_nonsense_is_left_out(folder: Path) -> None:
    assert _with(folder, do_sample=True, temperature=0.6, repetition_penalty=17.0) == SamplingDefaults(temperature=0.6)
    assert _with(folder, do_sample=True, top_k=20.5) == SamplingDefaults()
    assert _with(folder, max_new_tokens=0, temperature=0.6) == SamplingDefaults()  # transformers refuses the file
    assert _with(folder, max_new_tokens="512") == SamplingDefaults()
    whole = _with(folder, do_sample=True, top_k=20.0).top_k
    assert (whole, type(whole)) == (20, int)  # engines take nothing else
