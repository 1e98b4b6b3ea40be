"""Rope positions of documents with images, as the model itself computes them (Qwen-VL's mrope: time, height, width).

The model is built without weights, once per process: its own code knows how a grid of patches becomes positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rayswift.data.types import MediaKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Positions = Callable[[np.ndarray, Sequence[Mapping[str, np.ndarray]]], np.ndarray]
_TYPES: dict[MediaKind, int] = {"image": 1, "video": 2, "audio": 3}
"""How transformers numbers kinds in `mm_token_type_ids`."""
_GIVEN_AS = {"second_per_grid_ts": "second_per_grid_ts", "video_second_per_grid": "second_per_grids"}


def positions_of(model: PreTrainedModel, token_ids: Mapping[MediaKind, int]) -> Positions | None:
    """How the model places the tokens of one document; None for a model of plain positions.

    The result takes ids [T] and the features of the document's media in order, and gives positions [A, T].
    """
    owner: Any = next((one for one in (model, getattr(model, "model", None)) if hasattr(one, "get_rope_index")), None)
    if owner is None:
        return None
    accepted = set(inspect.signature(owner.get_rope_index).parameters)
    types = {token_ids[kind]: number for kind, number in _TYPES.items() if kind in token_ids}

    def place(ids: np.ndarray, media: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
        import torch

        given: dict[str, Any] = {"input_ids": torch.from_numpy(ids.astype(np.int64))[None]}
        given["attention_mask"] = torch.ones_like(given["input_ids"], dtype=torch.bool)  # omni indexes with it
        if "mm_token_type_ids" in accepted:
            given["mm_token_type_ids"] = torch.tensor([[types.get(int(token), 0) for token in ids]], dtype=torch.int32)
        for name in ("image_grid_thw", "video_grid_thw", *_GIVEN_AS):
            if found := [one[name] for one in media if name in one]:
                given[_GIVEN_AS.get(name, name)] = torch.from_numpy(np.concatenate(found))
        if lengths := [one["feature_attention_mask"].sum(-1) for one in media if "feature_attention_mask" in one]:
            given["audio_seqlens"] = torch.from_numpy(np.concatenate(lengths))
        positions, _ = owner.get_rope_index(**{name: value for name, value in given.items() if name in accepted})
        return np.asarray(positions[:, 0].to(torch.int64).numpy())

    return place
