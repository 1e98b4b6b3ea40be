"""Videos without torchvision: the sizes and patches of transformers' own video processors, read from their source."""

from __future__ import annotations

import ast
import json
import math
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rayswift.data.media.decoding import Clip
from rayswift.models.processor import load_processor
from tests.media_families import Family, family

BOUNDS = [(1024, 16384), (60_000, 90_000), (4096, 25165824)]


def of_transformers(model_type: str, name: str) -> Any:
    """A function of its video processor, whose module cannot be imported without torchvision."""
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "models" / model_type / f"video_processing_{model_type}.py"
    found = next(node for node in ast.walk(ast.parse(path.read_text()))
                 if isinstance(node, ast.FunctionDef) and node.name == name)  # fmt: skip
    known: dict[str, Any] = {"math": math, "torch": torch}
    exec(compile(ast.Module([found], []), str(path), "exec"), known)
    return known[name]


@pytest.fixture
def of(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Family:
    return family(request.param, tmp_path_factory)


def clip_of(count: int, size: tuple[int, int]) -> Clip:
    pixels = np.random.default_rng(count).integers(0, 256, (count, size[1], size[0], 3), dtype=np.uint8)
    return Clip([Image.fromarray(one) for one in pixels], [i / 2 for i in range(count)], count / 2)


def processor(of: Family, folder: Path, least: int, most: int, *, nested: bool) -> Any:
    """That of the family's folder with a video processor's own settings, in their own file or in the processor's."""
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(of.folder, folder)
    settings = {"size": {"shortest_edge": least, "longest_edge": most}}
    if nested:
        path = folder / "processor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"video_processor": settings}))
    else:
        (folder / "video_preprocessor_config.json").write_text(json.dumps(settings))
    return load_processor(str(folder)).video_processor


@pytest.mark.parametrize("of", ["qwen2_5_vl", "qwen3_vl", "qwen2_5_omni"], indirect=True)
@pytest.mark.parametrize("nested", [True, False])
def test_sizes_and_patches_are_those_of_transformers_own(of: Family, nested: bool, tmp_path: Path) -> None:
    model_type = "qwen3_vl" if of.name == "qwen3_vl" else "qwen2_vl"
    smart_resize, patchify = (of_transformers(model_type, name) for name in ("smart_resize", "patchify"))
    patch = 16 if of.name == "qwen3_vl" else 14
    for least, most in BOUNDS[:1] if nested else BOUNDS:
        ours = processor(of, tmp_path / "model", least, most, nested=nested)
        for count, size in ((2, (64, 48)), (3, (100, 40)), (4, (124, 124)), (5, (20, 200)), (7, (40, 33))):
            clip = clip_of(count, size)
            found = ours([clip])
            more = {"num_frames": count, "temporal_factor": 2} if of.name == "qwen3_vl" else {}
            height, width = smart_resize(
                height=size[1], width=size[0], factor=2 * patch, min_pixels=least, max_pixels=most, **more
            )
            frames = np.stack([np.asarray(frame.resize((width, height), Image.Resampling.BICUBIC)) for frame in clip])
            images = load_processor(str(of.folder)).image_processor
            values = (frames / 255 - images.image_mean) / images.image_std
            video = torch.from_numpy(values).float().permute(0, 3, 1, 2)[None]
            patches, *grid = patchify(None, video, patch, 2, 2)
            assert found["video_grid_thw"].tolist() == [grid], (least, most, count, size)
            assert np.abs(found["pixel_values_videos"] - patches[0].numpy()).max() < 1e-5


def test_a_film_of_one_frame_is_shown_twice(tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in ("qwen2_5_vl", "qwen3_vl"):
        found = load_processor(str(family(name, tmp_path_factory).folder)).video_processor([clip_of(1, (64, 64))])
        assert found["video_grid_thw"][0][0] == 1


@pytest.mark.parametrize("of", ["smolvlm", "internvl"], indirect=True)
def test_frames_that_are_pictures_are_those_of_the_image_processor(of: Family) -> None:
    ours = load_processor(str(of.folder))
    clip = clip_of(3, (50, 40))
    found = ours.video_processor([clip])
    name = "pixel_values" if of.name == "smolvlm" else "pixel_values_videos"
    whole = {"do_image_splitting": False} if of.name == "smolvlm" else {"crop_to_patches": False}
    for number, frame in enumerate(clip):
        alone = ours.image_processor(images=[frame], return_tensors="pt", **whole)["pixel_values"]
        assert torch.equal(found[name][0, number], alone.reshape(alone.shape[-3:]))
    (metadata,) = found["video_metadata"]
    assert (metadata.fps, metadata.duration, metadata.total_num_frames) == (2.0, 1.5, 3)
