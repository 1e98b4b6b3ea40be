"""The folder of an adapter put on a model, if its tensors have the names and sizes that the model's layers want.

Sizes are read from the header of its safetensors file and compared before a tensor is loaded: peft would raise half
way, and serving engines copy what is smaller into a corner of what is larger. Knows peft; does not know who asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift.config.job import ModelSpec
from rayswift.errors import ConfigError
from rayswift.models.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapter_state,
    load_base,
    read_binding,
    weights_sha256,
)
from rayswift.models.folder import broken, read_header, read_json
from rayswift.models.loading import local_folder, shape_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_KIND = "LORA"


def merge_adapter(base_dir: str, adapter_dir: str) -> PreTrainedModel:
    """The base with the adapter folder merged into its weights, in the base's dtype.

    Raises ConfigError when the adapter was trained on other weights, or does not say on which.
    """
    check_binding(base_dir, adapter_dir)
    merged: PreTrainedModel = attach_adapter(load_base(base_dir), adapter_dir).merge_and_unload(safe_merge=True)
    return merged


def attach_adapter(model: PreTrainedModel, adapter_dir: str) -> PeftModel:
    """`model` with the adapter of a folder on it, not merged.

    Raises ConfigError when its tensors are not those that its settings ask for, of which peft would fill in fresh ones,
    or when their sizes are not those of the model's layers.
    """
    adapted = _fresh(model, adapter_dir)
    _refuse_other_sizes(adapted, adapter_dir)
    with _refused(adapter_dir):
        report = adapted.load_adapter(adapter_dir, "default", is_trainable=False, local_files_only=True)
    for names, rule in ((report.missing_keys, "lacks"), (report.unexpected_keys, "has no layers for")):
        if names:
            raise ConfigError(
                f"{rule} {len(names)} tensors, among them {min(names)}: {ADAPTER_WEIGHTS} is not that of its "
                f"{ADAPTER_CONFIG}",
                path="adapter", value=adapter_dir, fix="copy the whole folder again",
            )  # fmt: skip
    return adapted


def check_sizes_fit(base: str, adapter_dir: str) -> None:
    """Raises ConfigError for an adapter that `attach_adapter` would refuse for its settings or its tensors' sizes.

    Reads headers only: neither the weights of the base nor those of the adapter are loaded.
    """
    import torch

    shapes = shape_model(ModelSpec(path=base), dtype=torch.float32)
    _refuse_other_sizes(_fresh(shapes, adapter_dir, low_cpu_mem_usage=True), adapter_dir)


def _fresh(model: PreTrainedModel, adapter_dir: str, *, low_cpu_mem_usage: bool = False) -> PeftModel:
    """`model` with an untrained adapter of the folder's settings. ConfigError for settings that are none of a LoRA."""
    from peft import LoraConfig, get_peft_model

    kind = read_json(Path(adapter_dir) / ADAPTER_CONFIG, field="adapter").get("peft_type")
    if kind != _KIND:
        raise ConfigError(
            f"has {kind or 'no kind'} as peft_type in its {ADAPTER_CONFIG}: only {_KIND} is known here",
            path="adapter", value=adapter_dir, fix="use a LoRA",
        )  # fmt: skip
    with _refused(adapter_dir):
        config = LoraConfig.from_pretrained(adapter_dir, local_files_only=True)
        config.inference_mode = True
        config.base_model_name_or_path = model.name_or_path  # or peft warns that it takes this one
        adapted: PeftModel = get_peft_model(model, config, low_cpu_mem_usage=low_cpu_mem_usage)
    return adapted


def _refuse_other_sizes(adapted: PeftModel, adapter_dir: str) -> None:
    """Raises ConfigError naming the first tensor of the folder that has another shape than the layer wants.

    Names that are not the model's are left to the loading, which knows those of older versions of transformers.
    """
    found = _shapes(adapter_dir)
    wanted = {name: list(tensor.shape) for name, tensor in adapter_state(adapted).items()}
    for name in sorted(found.keys() & wanted.keys()):
        if found[name] != wanted[name]:
            settings: Any = adapted.peft_config["default"]
            raise ConfigError(
                f"has {name} of shape {found[name]} in {ADAPTER_WEIGHTS}, where its {ADAPTER_CONFIG} of rank "
                f"{settings.r} and the layers of {adapted.name_or_path} want {wanted[name]}",
                path="adapter", value=adapter_dir,
                fix=f"use the {ADAPTER_WEIGHTS} and {ADAPTER_CONFIG} of one training, and the base it was trained on",
            )  # fmt: skip


def _shapes(adapter_dir: str) -> dict[str, list[int]]:
    """The shape of each tensor of an adapter's folder. ConfigError where its file of weights is missing or broken."""
    file = Path(adapter_dir) / ADAPTER_WEIGHTS
    reason = broken(file) if file.is_file() else "it is not there, and pickles can run code"
    if reason is not None:
        raise ConfigError(
            f"has no usable {ADAPTER_WEIGHTS}: {reason}", path="adapter", value=adapter_dir, fix="copy it again"
        )
    return {name: list(about["shape"]) for name, about in read_header(file).items() if name != "__metadata__"}


@contextmanager
def _refused(adapter_dir: str) -> Iterator[None]:
    """Turns what peft raises for settings or tensors that do not go with the model into a ConfigError."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(
            f"cannot be put on the model: {reason}", path="adapter", value=adapter_dir,
            fix=f"use the {ADAPTER_WEIGHTS} and {ADAPTER_CONFIG} of one training, and the base it was trained on",
        ) from error  # fmt: skip


def check_binding(base_dir: str, adapter_dir: str) -> None:
    """Raises ConfigError unless the adapter's recorded hash is that of the base's weights."""
    binding = read_binding(adapter_dir)
    found = weights_sha256(local_folder(base_dir))
    if binding["base_sha256"] != found:
        raise ConfigError(
            f"was trained on other weights than those of {base_dir}",
            path="adapter",
            value=adapter_dir,
            fix=f"merge it into {binding['base']} as it was then",
        )
