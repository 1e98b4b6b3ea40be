"""LoRA adapters of a vLLM engine: checked against the base before vLLM sees them, loaded when first asked for.

Knows vLLM's LoRARequest and its faults; where an adapter's folder comes from is known by `serving/adapters.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from pathlib import Path
from typing import Any

from rayswift.config.job import ModelSpec
from rayswift.errors import ConfigError
from rayswift.models.adapter_folder import check_sizes_fit
from rayswift.models.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BINDING,
    linear_modules,
    read_binding,
    weights_sha256,
)
from rayswift.models.loading import local_folder, shape_model
from rayswift.serving.adapter_store import own_folder, told_of_packed
from rayswift.serving.engine import Adapter, Refused

_ZERO_RANK = 8
FolderState = tuple[tuple[int, int, int] | None, ...]
_log = logging.getLogger("rayswift.serving")


class Adapters:
    """The adapters that one engine has been asked for. Used from one event loop.

    `pad_base` answers for the base through an adapter of zeros: vLLM 0.32 on a CPU gives a request without an adapter
    the weights of another request's adapter when both are in one batch.
    """

    def __init__(self, folder: str, *, pad_base: bool) -> None:
        self._folder, self._bases = folder, _bases(folder)
        self._numbers, self._loading = itertools.count(1), asyncio.Lock()
        self._known: dict[tuple[str, FolderState], Any] = {}
        home = own_folder(self, "rayswift-zero-")
        self._zero = self._numbered("base", _write_zeros(folder, home)) if pad_base else None

    async def request(self, llm: Any, adapter: Adapter | None) -> Any:
        """The LoRARequest of an adapter, loaded into `llm`. Raises Refused for one that does not fit the base.

        vLLM's EngineDeadError passes: then nothing fits any more.
        """
        if adapter is None:
            return self._zero
        key = adapter.folder, _state(adapter)
        if key not in self._known:
            async with self._loading:
                if key not in self._known:  # or somebody else has loaded it while this one waited
                    self._known[key] = await self._loaded(llm, adapter)
        return self._known[key]

    async def _loaded(self, llm: Any, adapter: Adapter) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        await asyncio.to_thread(self._check, adapter)
        made = self._numbered(adapter.name, adapter.folder)
        try:
            await llm.add_lora(made)
        except EngineDeadError:
            raise
        except Exception as error:  # the core reports whatever its loader raised
            raise Refused(f"the adapter {adapter.name} does not fit this model") from error
        return made

    def _check(self, adapter: Adapter) -> None:
        try:
            binding = read_binding(adapter.folder)
        except ConfigError as error:
            raise Refused(f"the adapter {adapter.name} does not say which weights it was trained on") from error
        if binding["base_sha256"] not in self._bases:
            raise Refused(f"the adapter {adapter.name} was trained on other weights than those of this model")
        try:
            check_sizes_fit(self._folder, adapter.folder)  # vLLM copies a smaller tensor into a corner of its own
        except ConfigError as error:
            _log.warning("the adapter %s is not served: %s", adapter.name, error)
            raise Refused(f"the adapter {adapter.name} does not fit this model") from error
        if how := binding.get("quantization"):
            _log.warning(told_of_packed(f"the adapter {adapter.name} was", str(how)))

    def _numbered(self, name: str, folder: str) -> Any:
        from vllm.lora.request import LoRARequest

        number = next(self._numbers)
        # vLLM tells adapters apart by their names, and a replaced adapter keeps its own.
        return LoRARequest(lora_name=f"{name}#{number}", lora_int_id=number, lora_path=folder)


def _bases(folder: str) -> frozenset[str]:
    """Hashes of the weights that adapters of this folder were trained on: its own, or those it was exported from."""
    from rayswift.export.manifest import MANIFEST, read

    here = local_folder(folder)
    own = weights_sha256(here)
    if not (here / MANIFEST).is_file():
        return frozenset({own})
    manifest = read(here)
    untrained = manifest.earlier is not None or (manifest.method is None and manifest.adapter is None)
    return frozenset({own, manifest.base_sha256}) if untrained else frozenset({own})


def _state(adapter: Adapter) -> FolderState:
    """What changes when a file of it is written again. Asked with every request, so none is read for it.

    The config scales the weights (lora_alpha), and the binding says whose they are. Raises Refused without weights.
    """
    states = [_file_state(Path(adapter.folder) / name) for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG, BINDING)]
    if states[0] is None:
        raise Refused(f"the adapter {adapter.name} is not complete")
    return tuple(states)


def _file_state(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None  # what is missing is told when the adapter is loaded
    return found.st_ino, found.st_size, found.st_mtime_ns


def _write_zeros(folder: str, home: Path) -> str:
    """A folder with an adapter that changes nothing: zeros on one linear layer."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    name, layer = next(iter(linear_modules(shape_model(ModelSpec(path=folder), dtype=torch.bfloat16)).items()))
    LoraConfig(r=_ZERO_RANK, target_modules=[name.rpartition(".")[2]], base_model_name_or_path=folder).save_pretrained(
        str(home)
    )
    zeros = {f"base_model.model.{name}.lora_A.weight": torch.zeros(_ZERO_RANK, layer.in_features),
             f"base_model.model.{name}.lora_B.weight": torch.zeros(layer.out_features, _ZERO_RANK)}  # fmt: skip
    save_file(zeros, home / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    return str(home)
