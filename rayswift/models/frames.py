"""Videos through a model's image processor: frames by frames, where transformers' own would need torchvision.

Two kinds of models are known: those whose patches span two frames (Qwen-VL), and those that see each frame as a picture
(InternVL, SmolVLM). A clip is a list of Pillow images with `times`, `duration` and `fps`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np


def video_processor(
    image_processor: Any, given: Mapping[str, Any], model_type: str = ""
) -> _PatchedFrames | _WholeFrames:
    """What stands for the model's video processor. `given`: its own settings, where the folder has them."""
    if not hasattr(image_processor, "temporal_patch_size"):
        return _WholeFrames(image_processor)
    name = str(given.get("video_processor_type") or model_type).lower().replace("_", "")
    return _PatchedFrames(image_processor, given, is_shared=name.startswith(("qwen3vl", "qwen35")))


class _PatchedFrames:
    """Patches of `temporal_patch_size` frames; an odd frame is repeated, as the model's own processor does.

    `is_shared`: the bounds on pixels are those of all frames together (Qwen3-VL), else of each frame (Qwen2-VL).
    """

    def __init__(self, image_processor: Any, given: Mapping[str, Any], *, is_shared: bool) -> None:
        self._images = image_processor
        self.temporal_patch_size = int(image_processor.temporal_patch_size)
        self.merge_size = int(image_processor.merge_size)
        size = given.get("size") or image_processor.size
        self._least = int(given.get("min_pixels") or size["shortest_edge"])
        self._most = int(given.get("max_pixels") or size["longest_edge"])
        self._is_shared = is_shared

    def __call__(self, videos: Sequence[Any], **_: Any) -> dict[str, Any]:
        """`pixel_values_videos` [patches, values], `video_grid_thw` [videos, 3] and metadata of the clips."""
        done = [self._one(clip) for clip in videos]
        return {
            "pixel_values_videos": np.concatenate([pixels for pixels, _ in done]),
            "video_grid_thw": np.stack([grid for _, grid in done]),
            "video_metadata": [_metadata(clip) for clip in videos],
        }

    def _one(self, clip: Any) -> tuple[np.ndarray, np.ndarray]:
        span = self.temporal_patch_size
        how: dict[str, Any] = {"size": {"shortest_edge": self._least, "longest_edge": self._most}}
        frames = list(clip)
        if self._is_shared:
            width, height = self._shared_size(max(span, len(frames)), *frames[0].size)
            frames = [frame.resize((width, height), self._images.resample) for frame in frames]
            how = {"do_resize": False}
        frames += [frames[-1]] * (-len(frames) % span)
        found = self._images(images=frames, return_tensors="np", **how)
        grids = found["image_grid_thw"]
        height, width = int(grids[0][1]), int(grids[0][2])
        # An image is repeated over the span of a patch: of each frame its own place in the span is taken.
        values = found["pixel_values"].reshape(len(frames) // span, span, height * width, -1, span, self._patch_area)
        patches = np.stack([values[:, i, :, :, i] for i in range(span)], axis=3)
        pixels = patches.reshape(len(frames) // span * height * width, -1)
        return np.ascontiguousarray(pixels), np.array([len(frames) // span, height, width])

    @property
    def _patch_area(self) -> int:
        return int(self._images.patch_size) ** 2

    def _shared_size(self, num_frames: int, width: int, height: int) -> tuple[int, int]:
        """Width and height of each frame: `smart_resize` of transformers' video_processing_qwen3_vl.py."""
        unit = int(self._images.patch_size) * self.merge_size
        if min(width, height) < unit:
            scale = max(unit / width, unit / height)
            width, height = int(width * scale), int(height * scale)
        if max(width, height) > 200 * min(width, height):
            raise ValueError("a frame's sides must be at most as 200 to 1")
        sides = [round(side / unit) * unit for side in (width, height)]
        span = self.temporal_patch_size
        total, real = round(num_frames / span) * span * sides[0] * sides[1], num_frames * width * height
        if total > self._most:
            sides = [
                max(unit, math.floor(side / math.sqrt(real / self._most) / unit) * unit) for side in (width, height)
            ]
        elif total < self._least:
            sides = [math.ceil(side * math.sqrt(self._least / real) / unit) * unit for side in (width, height)]
        return sides[0], sides[1]


class _WholeFrames:
    """Each frame as one uncut picture."""

    merge_size = temporal_patch_size = 1

    def __init__(self, image_processor: Any) -> None:
        self._images = image_processor

    def __call__(self, videos: Sequence[Any], **_: Any) -> dict[str, Any]:
        """`pixel_values_videos` [videos, frames, 3, H, W]; the name that SmolVLM has for it too."""
        import torch

        splits = hasattr(self._images, "do_image_splitting")  # SmolVLM, whose frames come under the name of images
        whole = {"do_image_splitting": False} if splits else {"crop_to_patches": False}
        done = [self._images(images=[list(clip)] if splits else list(clip), return_tensors="pt", **whole)
                for clip in videos]  # fmt: skip
        pixels = torch.stack([one["pixel_values"].reshape(-1, *one["pixel_values"].shape[-3:]) for one in done])
        found = {"pixel_values" if splits else "pixel_values_videos": pixels}
        if splits:
            found["pixel_attention_mask"] = torch.cat([one["pixel_attention_mask"] for one in done])
        return {**found, "video_metadata": [_metadata(clip) for clip in videos]}


def _metadata(clip: Any) -> SimpleNamespace:
    """What processors ask of a video: frames are numbered as if all had been kept."""
    return SimpleNamespace(
        fps=clip.fps, sampled_fps=clip.fps, frames_indices=np.arange(len(clip)), timestamps=list(clip.times),
        duration=clip.duration, total_num_frames=len(clip),
    )  # fmt: skip
