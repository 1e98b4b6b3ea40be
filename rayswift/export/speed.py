"""How fast a quantized model answers beside the one that it was made of: both in engine `local`, on the same prompts.

In that engine because the unquantized model is loaded in no other one: vLLM would have to be started for it alone, from
files that are nowhere. Knows what each is asked with; how it is timed is known by `serving/local/probe.py`.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from rayswift.errors import RaySwiftError
from rayswift.export.greedy import prompt_room
from rayswift.export.measured import Served, Speed, Speeds
from rayswift.models.config_sizes import num_positions
from rayswift.models.folder import read_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from rayswift.serving.local import probe

ENGINE = "local"


def unquantized(model: PreTrainedModel, base: Path, dtype: str, prompts: Sequence[Sequence[int]]) -> probe.Speed | None:
    """The speed of a model as it would be served in `dtype`: its weights in what engine `local` loads from `base`.

    None, which is told, where that engine does not serve it or has no room.
    """
    size = sum(p.numel() for p in model.parameters())
    return _timed(base, prompts, _computed_in(dtype, size), model.state_dict())


def beside(
    before: probe.Speed | None, served: Served | None, folder: Path, prompts: Sequence[Sequence[int]], bytes_before: int
) -> Speeds | None:
    """The speed of the quantized model in `folder` beside that `before`; as `served` says it, if that was this engine.

    None where there is nothing to be compared.
    """
    from rayswift.serving.local.probe import SPEED_CONCURRENCY, SPEED_TOKENS

    if before is None:
        return None
    after = _as_served(served) or _timed(folder, prompts)
    if after is None:
        return None
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Speeds(
        engine=ENGINE,
        version=f"transformers {version('transformers')}",
        device=after.device,
        num_answers=SPEED_CONCURRENCY,
        num_tokens=SPEED_TOKENS,
        before=_record(before, bytes_before),
        after=_record(after, size),
        ratio=after.tokens_per_second / before.tokens_per_second,
        first_token_ratio=after.first_token_s / before.first_token_s,
    )


def _timed(
    folder: Path, prompts: Sequence[Sequence[int]], dtype: str = "auto",
    trained: dict[str, torch.Tensor] | None = None,
) -> probe.Speed | None:  # fmt: skip
    import torch

    from rayswift.serving.local.probe import speed_of

    try:
        room = prompt_room(num_positions(read_json(folder / "config.json", field="model.path")))
        return speed_of(str(folder), [ids[:room] for ids in prompts], dtype, trained)
    except (RaySwiftError, torch.OutOfMemoryError) as error:
        reason = " ".join(str(error).split())[:300]
        print(f"note: speed is not compared: {reason}", file=sys.stderr)
        return None
    finally:
        if torch.accelerator.is_available():  # vLLM wants it for itself
            gc.collect()
            torch.accelerator.empty_cache()


def _computed_in(dtype: str, num_params: int) -> str:
    """What engine `local` computes in on this machine, given files of `dtype`: see `serving/local/precision.py`."""
    import torch

    from rayswift.serving.local import precision

    half: torch.dtype = getattr(torch, dtype)
    if torch.accelerator.is_available() or half == torch.float32 or precision.is_known(half):
        return dtype
    room = precision.MOST_OF_MEMORY * precision.memory_left()
    return "float32" if num_params * torch.float32.itemsize <= room else dtype


def _as_served(served: Served | None) -> probe.Speed | None:
    from rayswift.serving.local import probe

    if served is None or served.engine != ENGINE or served.first_token_s is None:
        return None
    return probe.Speed(
        served.load_s, served.first_token_s, served.tokens_per_second, str(served.dtype), str(served.device)
    )


def _record(found: probe.Speed, size: int) -> Speed:
    return Speed(
        dtype=found.dtype, size_bytes=size, load_s=found.load_s, first_token_s=found.first_token_s,
        tokens_per_second=found.tokens_per_second,
    )  # fmt: skip
