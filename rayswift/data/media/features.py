"""Features of several media as one array: how the items of a batch are laid end to end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rayswift.data.types import NUM_PLACEHOLDERS, Example, Features


def model_features(media: Sequence[Features]) -> dict[str, torch.Tensor]:
    """The features of all media laid end to end, by the name of the model's argument."""
    names = dict.fromkeys(name for features in media for name in features if name != NUM_PLACEHOLDERS)
    return {name: torch.from_numpy(laid_together([one[name] for one in media if name in one])) for name in names}


def model_inputs(example: Example) -> dict[str, torch.Tensor]:
    """What a model's forward is given of one document alone: ids [1, T], features, and rope positions [1 + A, 1, T].

    As in training, the first of several position axes is the plain one. A model of plain positions is given none.
    """
    inputs = {"input_ids": torch.tensor([example.input_ids]), **model_features(example.media)}
    if example.rope_AT is not None:
        plain_1T = torch.arange(len(example.input_ids))[None]
        inputs["position_ids"] = torch.cat([plain_1T, torch.from_numpy(example.rope_AT)])[:, None]
    return inputs


def laid_together(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The items of all parts, smaller ones padded with zeros, which their masks have too.

    They lie on the first axis, or on the second of what Idefics and SmolVLM have: rows come before pictures there.
    """
    axis = 1 if parts[0].ndim == 5 or (parts[0].ndim == 4 and parts[0].dtype.kind in "ib") else 0
    shape = np.max([part.shape for part in parts], axis=0)
    padded = []
    for part in parts:
        room = [(0, 0 if i == axis else int(shape[i] - size)) for i, size in enumerate(part.shape)]
        padded.append(np.pad(part, room) if any(after for _, after in room) else part)
    return np.concatenate(padded, axis=axis)
