"""Videos through a model's image processor: frames by frames, where transformers' own would need torchvision.

Two kinds of models are known: those whose patches span two frames (Qwen-VL), and those that see each frame as a picture
(InternVL, SmolVLM). A clip is a list of Pillow images with `times`, `duration` and `fps`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np


def video_processor(image_processor: Any, given: Mapping[str, Any]) -> _PatchedFrames | _WholeFrames:
    """What stands for the model's video processor. `given`: its own settings, where the folder has them."""
    kind = _PatchedFrames if hasattr(image_processor, "temporal_patch_size") else _WholeFrames
    return kind(image_processor, given)


class _PatchedFrames:
    """Patches of `temporal_patch_size` frames; an odd frame is repeated, as the model's own processor does."""

    def __init__(self, image_processor: Any, given: Mapping[str, Any]) -> None:
        self._images = image_processor
        self.temporal_patch_size = int(image_processor.temporal_patch_size)
        self.merge_size = int(image_processor.merge_size)
        self._size = given.get("size")

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
        frames = [*clip, *[clip[-1]] * (-len(clip) % span)]
        found = self._images(images=frames, return_tensors="np", **self._budget(len(frames)))
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

    def _budget(self, num_frames: int) -> dict[str, Any]:
        """All frames of a video share the pixels that the model's own settings allow for one."""
        if not self._size:
            return {}
        least = int(self._images.size["shortest_edge"])
        return {"size": {"shortest_edge": least, "longest_edge": max(least, self._size["longest_edge"] // num_frames)}}


class _WholeFrames:
    """Each frame as one uncut picture."""

    merge_size = temporal_patch_size = 1

    def __init__(self, image_processor: Any, given: Mapping[str, Any]) -> None:
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
