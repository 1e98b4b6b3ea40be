"""What an image is to engine vllm before vLLM has a part in it: whose images it takes, and what it knows them by."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rayswift.config.job import MediaSpec
from rayswift.data.types import NUM_PLACEHOLDERS
from rayswift.serving.vllm import media
from tests.multimodal_models import make


def test_models_are_known_by_their_type(tmp_path: Path) -> None:
    assert media.refusal(str(make("qwen2_5_vl", tmp_path / "qwen"))) is None
    llava = make("llava", tmp_path / "llava")
    assert media.refusal(str(llava)) is media.misnamed(str(llava)) is None
    assert "text alone of a model of type smolvlm" in str(media.refusal(str(make("smolvlm", tmp_path / "smolvlm"))))
    config = json.loads((llava / "config.json").read_text())
    config["vision_config"]["model_type"] = "siglip_vision_model"
    (llava / "config.json").write_text(json.dumps(config))
    assert "LLaVA whose tower is a siglip_vision_model" in str(media.refusal(str(llava)))


def test_without_what_vllm_imports_for_images_a_model_gets_text_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(make("qwen3_vl", tmp_path / "m"))
    monkeypatch.setattr(media, "LIBRARY", "a_library_that_is_not_here")
    assert media.encoder_of(folder, MediaSpec()) is None
    assert "served with text alone" in caplog.text
    assert media.arguments(None, on_cpu=True) == {"language_model_only": True}
    monkeypatch.setattr(media, "LIBRARY", "torch")
    encoder = media.encoder_of(folder, MediaSpec(max_pixels=5))
    assert encoder is not None
    assert encoder.spec.max_pixels == 5
    assert media.arguments(encoder, on_cpu=False)["mm_device_do_normalize"] is False


def test_images_are_known_by_every_feature() -> None:
    one = {"pixel_values": np.zeros((4, 2), np.float32), "image_grid_thw": np.array([[1, 2, 2]])}
    others = [
        one | {"pixel_values": np.zeros((4, 2), np.float32) + 1e-7},
        one | {"pixel_values": np.zeros((2, 4), np.float32)},
        one | {"image_grid_thw": np.array([[1, 1, 4]])},
        {"pixels": one["pixel_values"], "image_grid_thw": one["image_grid_thw"]},
    ]
    assert len({media._sha256(features) for features in (one, *others)}) == 5
    assert media._sha256(one | {NUM_PLACEHOLDERS: np.array([1])}) == media._sha256(dict(reversed(one.items())))
