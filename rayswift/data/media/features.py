"""Features of several media as one array: how the items of a batch are laid end to end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


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
