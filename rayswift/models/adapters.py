"""Low-rank adapters: added to a model, named in its state, saved, and bound to their base.

Knows peft and the hash that binds an adapter to the weights it was trained on. Does not know how it is trained. A
folder of one is put on a model by `adapter_folder`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift.errors import ConfigError
from rayswift.models.folder import read_json, weight_files
from rayswift.models.loading import load_model, local_folder
from rayswift.models.staging import staged_folder
from rayswift.planning.parts import PARTS, part_of

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from rayswift.config.job import AdapterSpec, ModelSpec, Part

BINDING = "rayswift_base.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ALL_LINEAR = "all-linear"


def linear_layers(model: PreTrainedModel) -> list[str]:
    """The sorted short names (`q_proj`) of the linear layers an adapter can go on; the output layer is not one."""
    return sorted({name.rpartition(".")[2] for name in linear_modules(model)})


def add_lora(model: PreTrainedModel, spec: AdapterSpec, seed: int, *, freeze: Sequence[Part] = ()) -> PeftModel:
    """`model` frozen, with a fresh float32 adapter of `spec` on its targets: the same one for the same seed.

    Parts in `freeze` get none. The adapter starts as zero: the model computes what it did before. Raises ConfigError
    for a target that is no linear layer of the model.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    alpha: Any = spec.alpha  # peft annotates an int but only divides it by the rank: a fraction is fine
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=alpha,
        lora_dropout=spec.dropout,
        target_modules=_outside(model, _targets(model, spec), freeze),
        fan_in_fan_out=_is_transposed(model),
        task_type="CAUSAL_LM",
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Adapters are cast below; peft would look for dtypes in packed weights, too.
        adapted: PeftModel = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert "lora_" in name, name
            parameter.data = parameter.data.float()
    return adapted


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names of an `adapter_model.safetensors`, shared with the model."""
    from peft import get_peft_model_state_dict

    # The default would ask the hub whether the vocabulary was resized.
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def load_adapter_state(model: PeftModel, state: Mapping[str, torch.Tensor]) -> None:
    """Fill the adapter from tensors named as in `adapter_state`, or as in the model's own state dict.

    Raises ConfigError when names or shapes are not those of this adapter: peft would leave the rest untrained.
    """
    import torch

    own = adapter_state(model)
    given = {name.replace(".default.", "."): tensor for name, tensor in state.items()}
    wrong = sorted(set(own) ^ set(given)) or sorted(n for n in own if own[n].shape != given[n].shape)
    if wrong:
        raise ConfigError(
            f"does not fit the saved tensors: {len(wrong)} differ, among them {wrong[0]}",
            path="adapter",
            fix="use the adapter settings it was trained with",
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])


def save_adapter(model: PeftModel, directory: str | Path, *, base: str) -> None:
    """Write the adapter as a peft folder that also says which base, by name and hash, it belongs to."""
    base_sha256 = weights_sha256(local_folder(base))
    with staged_folder(directory) as stage:
        write_adapter(model, stage, base=base, base_sha256=base_sha256)


def write_adapter(
    model: PeftModel, folder: Path, *, base: str, base_sha256: str, packed: ModelSpec | None = None
) -> None:
    """As `save_adapter`, into a folder that is there and that nobody trusts yet. `packed` says how the base was."""
    from safetensors.torch import save_file

    config = model.peft_config["default"]
    config.base_model_name_or_path = base
    config.save_pretrained(str(folder))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter_state(model).items()}
    save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    binding = {"base": base, "base_sha256": base_sha256}
    if packed is not None and packed.quantization is not None:
        binding |= {"quantization": packed.quantization, "dtype": packed.dtype}
    (folder / BINDING).write_text(json.dumps(binding, indent=2) + "\n", encoding="utf-8")


def load_base(path: str, *, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
    """The model of a folder or hub id, as `load_model` gives it, with the settings a job would have by default."""
    from rayswift.config.job import ModelSpec

    return load_model(ModelSpec(path=path), dtype=dtype)


def read_binding(adapter_dir: str) -> dict[str, Any]:
    """`base` and `base_sha256` of an adapter folder, and `quantization` and `dtype` where the base was packed.

    Raises ConfigError when it names no base.
    """
    if not (Path(adapter_dir) / BINDING).is_file():
        raise ConfigError(
            f"has no {BINDING}: which weights it was trained on is unknown",
            path="adapter",
            value=adapter_dir,
            fix="use an adapter folder that RaySwift wrote",
        )
    binding = read_json(Path(adapter_dir) / BINDING, field="adapter")
    if not {"base", "base_sha256"} <= binding.keys():
        raise ConfigError(f"has a {BINDING} without base and base_sha256", path="adapter", value=adapter_dir)
    return binding


def weights_sha256(folder: Path) -> str:
    """sha256 (hex) over the names and contents of a folder's safetensors files: the identity of a base model."""
    total = hashlib.sha256()
    for name in weight_files(folder):
        total.update(f"{name}:{file_sha256(folder / name)}\n".encode())
    return total.hexdigest()


def file_sha256(file: Path) -> str:
    """The sha256 (hex) of one file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def linear_modules(model: PreTrainedModel) -> dict[str, Any]:
    """The linear layers an adapter can go on, by name; the output layer is not one."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}


def _is_transposed(model: PreTrainedModel) -> bool:
    """Whether weights are stored input first, as in gpt2's Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in linear_modules(model).values())


def freeze_parts(model: PreTrainedModel, parts: Sequence[Part]) -> None:
    """Take these parts of the model out of training. Raises ConfigError for one it does not have, or all of them."""
    own = {part_of(name) for name, _ in model.named_parameters()}
    for part in parts:
        if part not in own:
            raise ConfigError(
                f"is no part of {type(model).__name__}", path="model.freeze", value=part,
                fix=f"it has {' and '.join(one for one in PARTS if one in own)}",
            )  # fmt: skip
    if own <= set(parts):
        raise ConfigError("leaves nothing to train", path="model.freeze", value=list(parts), fix="leave out a part")
    for name, parameter in model.named_parameters():
        if part_of(name) in parts:
            parameter.requires_grad_(False)


def _outside(model: PreTrainedModel, targets: list[str], freeze: Sequence[Part]) -> list[str]:
    """The targets as whole names outside of the frozen parts; as they are where nothing is frozen."""
    if not freeze:
        return targets
    names = [
        name
        for name in linear_modules(model)
        if part_of(name) not in freeze and any(name == one or name.endswith(f".{one}") for one in targets)
    ]
    if not names:
        raise ConfigError(
            "leaves no layer that an adapter goes on", path="model.freeze", value=list(freeze),
            fix="leave out a part, or name layers of the other parts in adapter.targets",
        )  # fmt: skip
    return names


def _all_linear(model: PreTrainedModel) -> list[str]:
    """The short names of all linear layers, whole ones where a module of another kind ends in the same.

    A linear layer that is called `0`, as in Qwen-VL's mergers, would stand for the first block of every stack.
    """
    modules = linear_modules(model)
    others = {name.rpartition(".")[2] for name, _ in model.named_modules() if name not in modules}
    return sorted({name if (short := name.rpartition(".")[2]) in others else short for name in modules})


def _targets(model: PreTrainedModel, spec: AdapterSpec) -> list[str]:
    """The targets as peft takes them. Raises ConfigError for a name that no linear layer ends in."""
    if spec.targets == _ALL_LINEAR:
        return _all_linear(model)  # peft's own `all-linear` also rewrites fused experts, which are no linear layers
    names = [spec.targets] if isinstance(spec.targets, str) else list(spec.targets)
    modules = linear_modules(model)
    for target in names:
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            raise ConfigError(
                f"is not a linear layer of {type(model).__name__}",
                path="adapter.targets",
                value=target,
                fix=f"use all-linear or some of {', '.join(linear_layers(model))}",
            )
    if not names:
        raise ConfigError(
            "is empty", path="adapter.targets", fix=f"use all-linear or some of {', '.join(linear_layers(model))}"
        )
    return names
