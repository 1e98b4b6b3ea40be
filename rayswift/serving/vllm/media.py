"""Images for a vLLM engine: the ids and features that training makes of them, in place of its own processor's.

So vLLM decodes no file, and no placeholder is its own: bounds, decoding and prompts stay those of `serving/prompts.py`.
Knows the models whose log-probabilities were compared with transformers', and how vLLM 0.32 lays features out.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from rayswift.config.job import MediaSpec
from rayswift.data.types import NUM_PLACEHOLDERS, Features
from rayswift.models.folder import read_json
from rayswift.models.hub_names import has_hub_names
from rayswift.models.loading import local_folder
from rayswift.serving.engine import Prompt, Refused

if TYPE_CHECKING:
    from rayswift.data.media.encoder import MediaEncoder

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl")
"""Of others vLLM is given text alone."""
_LLAVA_TOWER = "clip_vision_model"
LIBRARY = "torchvision"
"""What vLLM's models of images import."""
_log = logging.getLogger("rayswift.serving")


def refusal(folder: str) -> str | None:
    """Why vLLM is asked about text alone of a folder that has a processor; None for a model that it was proved with."""
    config = read_json(local_folder(folder, weights=False) / "config.json", field="models")
    kind, tower = config.get("model_type"), config.get("vision_config", {}).get("model_type")
    if kind not in FAMILIES:
        return f"engine vllm is given text alone of a model of type {kind}"
    if kind == "llava" and tower != _LLAVA_TOWER:
        return f"engine vllm is given text alone of a LLaVA whose tower is a {tower}"
    return None


def misnamed(folder: str) -> str | None:
    """Why vLLM does not read the weights in the folder of a model that it was proved with; None where it does."""
    if has_hub_names(local_folder(folder, weights=False)):
        return None
    return "its tower's weights have not the names of the hub, which vLLM reads; an export of it has them"


def encoder_of(folder: str, bounds: MediaSpec) -> MediaEncoder | None:
    """What makes features of images for this engine; None, with a warning, where it is given text alone."""
    from rayswift.training.media import load_encoder

    reason = refusal(folder) or misnamed(folder)
    if reason is None and importlib.util.find_spec(LIBRARY) is None:
        reason = f"{LIBRARY} is not here, which vLLM needs for images"
    if reason is None:
        return load_encoder(folder, bounds)
    _log.warning("%s is served with text alone: %s", folder, reason)
    return None


def arguments(encoder: MediaEncoder | None, *, on_cpu: bool) -> dict[str, Any]:
    """What vLLM's engine is given beside the rest for a model that has a processor."""
    if encoder is None:
        return {"language_model_only": True}
    return {
        "limit_mm_per_prompt": {"video": 0, "audio": 0},
        "mm_device_do_normalize": False,  # features are as the processor makes them, normalized
        "mm_processor_cache_gb": 0,  # nothing is processed there
        "skip_mm_profiling": on_cpu,  # the largest image that there may be takes a CPU minutes
    }


def inputs(llm: Any, prompt: Prompt, encoder: MediaEncoder | None) -> dict[str, Any]:
    """A prompt with media as AsyncLLM takes it. Raises Refused for media that are no images."""
    from vllm.inputs.engine import mm_input
    from vllm.multimodal.inputs import MultiModalKwargsItems

    assert encoder is not None, "media come from the encoder"
    processor = llm.renderer.get_mm_processor()
    items = [_item(processor, features) for features in prompt.media]
    made: dict[str, Any] = mm_input(
        list(prompt.ids),
        MultiModalKwargsItems({"image": items}),
        {"image": [_sha256(features) for features in prompt.media]},
        {"image": _places(prompt, encoder)},
    )
    return made


def _item(processor: Any, features: Features) -> Any:
    """The features of one image as vLLM's model takes them; which of them are its own is known by its processor."""
    import torch
    from transformers import BatchFeature
    from vllm.multimodal.inputs import MultiModalKwargsItems

    tensors = {name: torch.from_numpy(np.array(values)) for name, values in _own(features).items()}
    batch = BatchFeature(tensors)
    found = MultiModalKwargsItems.from_hf_inputs(batch, processor._get_mm_fields_config(batch, {}))
    if set(found) != {"image"} or len(found["image"]) != 1:
        raise Refused("engine vllm is given images alone, one at each place")
    return found["image"][0]


def _places(prompt: Prompt, encoder: MediaEncoder) -> list[Any]:
    """Where the tokens of each image are."""
    import torch
    from vllm.multimodal.inputs import PlaceholderRange

    stands_T = np.isin(prompt.ids, list(encoder.placeholders.values()))
    places, first, found = np.flatnonzero(stands_T), 0, list[Any]()
    for features in prompt.media:
        own = places[first : first + int(features[NUM_PLACEHOLDERS][0])]
        first += len(own)
        inside = stands_T[own[0] : own[-1] + 1]
        mask = None if inside.all() else torch.from_numpy(inside)
        found.append(PlaceholderRange(offset=int(own[0]), length=len(inside), is_embed=mask))
    return found


def _own(features: Features) -> Features:
    return {name: values for name, values in features.items() if name != NUM_PLACEHOLDERS}


def _sha256(features: Features) -> str:
    """What vLLM knows an image by in its caches: the same for the same features alone."""
    digest = hashlib.sha256()
    for name, values in sorted(_own(features).items()):
        digest.update(f"{name} {values.dtype} {values.shape};".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
