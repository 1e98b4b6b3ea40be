"""From a model path in a job to config, tokenizer and model: a local Hugging Face folder, or a hub id.

Knows how a hub id becomes a folder (cached, `org/name@revision`) and what transformers makes of one; which files a
folder holds is known by `folder.py`. Does not know adapters, devices or sharding. torch and transformers are imported
inside the functions that need them, so that `check_folder` is cheap enough for the driver to call before it starts a
cluster.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift.config.job import ModelSpec, is_hub_id
from rayswift.errors import ConfigError
from rayswift.models.auto import auto_class, import_transformers, register_parts
from rayswift.models.config_sizes import check_sizes
from rayswift.models.folder import (
    check_tokenizer,
    check_unpacked,
    check_weights,
    has_chat_template,
    processors_template,
    read_json,
)
from rayswift.models.quantized import quantized, unpack_on_the_way_in
from rayswift.models.quiet import quiet_progress
from rayswift.models.remote_code import check_code

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
_LAYER = re.compile(r"(.*?)\.(\d+)\.")


def split_id(path: str) -> tuple[str, str | None]:
    """`("org/name", "revision")` for `org/name@revision`; the revision is None where none is given.

    A folder that exists keeps an `@` in its name.
    """
    if "@" not in path or os.path.isdir(path):
        return path, None
    name, _, revision = path.rpartition("@")
    return name, revision or None


def local_folder(path: str, *, weights: bool = True, field: str = "model.path") -> Path:
    """The folder behind a model path; a hub id is downloaded (once, cached), without weights if `weights` is False.

    Raises ConfigError naming `field` when there is no such folder and the hub cannot give one.
    """
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path):
        raise ConfigError("is a file, not a Hugging Face folder", path=field, value=path, fix="name its folder")
    if not is_hub_id(path):
        raise ConfigError(
            "is not a folder", path=field, value=path, fix="check the path; `rayswift model init` makes one"
        )
    name, revision = split_id(path)
    return _hub_folder(path, name, revision, weights=weights, field=field)


def _hub_folder(path: str, name: str, revision: str | None, *, weights: bool, field: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    cause: Exception
    patterns = [*_SMALL_FILES, *(["*.safetensors"] if weights else [])]
    try:
        with quiet_progress():
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        rule, fix, cause = "is gated on the hub", "accept its terms there and log in with `hf auth login`", error
    except RevisionNotFoundError as error:
        rule, fix, cause = f"has no revision {revision} on the hub", "check the part after @", error
    except RepositoryNotFoundError as error:
        rule, fix, cause = "is neither a folder nor a model on the hub", "check the spelling", error
    except (
        OSError,
        ValueError,
    ) as error:  # the hub's own errors and httpx's, via OSError; HFValidationError is a ValueError
        rule, fix, cause = "is not a folder, and the model hub cannot be reached", "give an existing folder", error
    raise ConfigError(rule, path=field, value=path, fix=fix) from cause


def check_folder(
    path: str, *, chat_template: bool = False, field: str = "model.path", read_only: bool = False
) -> dict[str, Any]:
    """The parsed config.json of a model that has config, weights, tokenizer and, if asked for, a chat template.

    Reads names and headers only, no tensor data. Of a hub id only the small files are fetched and checked. Raises
    ConfigError with the folder, what is missing, broken, or asks for code to be run, and the fix; unless the model is
    `read_only`, served or judged as it is, also for weights that cannot be written again.
    """
    remote = not os.path.isdir(path)
    folder = local_folder(path, weights=False, field=field)
    config = read_json(folder / "config.json", field=field)
    if "model_type" not in config:
        raise ConfigError(
            "has a config.json without model_type", path=field, value=path, fix="use a transformers model"
        )
    check_code(folder, field=field)
    check_sizes(config, path, field=field)
    if not read_only:
        check_unpacked(config, path, field=field)
    check_tokenizer(folder, field=field)
    if chat_template and not has_chat_template(folder):
        raise ConfigError(
            "has a tokenizer without chat template, which conversations are rendered with",
            path=field,
            value=path,
            fix="add chat_template.jinja to the folder, or train on plain text",
        )
    if not remote:
        check_weights(folder, field=field)
    return config


def load_config(path: str, *, field: str = "model.path") -> PretrainedConfig:
    """The transformers config of a folder or hub id. Raises ConfigError for what transformers cannot build."""
    import_transformers()
    from transformers import AutoConfig, PretrainedConfig

    folder = local_folder(path, weights=False, field=field)
    check_sizes(read_json(folder / "config.json", field=field), path, field=field)
    check_code(folder, field=field)
    register_parts()
    with refusals_named(path, field):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    assert isinstance(config, PretrainedConfig)
    return config


def load_tokenizer(path: str, *, field: str = "model.path") -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id. Raises ConfigError when the folder has none."""
    import_transformers()
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    folder = local_folder(path, weights=False, field=field)
    check_tokenizer(folder, field=field)
    check_code(folder, field=field)
    with refusals_named(path, field):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    tokenizer.chat_template = tokenizer.chat_template or processors_template(folder)
    return tokenizer


def load_model(
    spec: ModelSpec, *, dtype: torch.dtype | str | None = None, auto: Any = None, may_lack: tuple[str, ...] = ()
) -> PreTrainedModel:
    """The language model of `spec`, with its towers if any, on the CPU in `dtype` (None: as stored), without cache.

    With a cache the packed documents of a sequence would see each other. `spec.quantization` packs all linear layers
    but the head into 4 bits. Only safetensors are read and no code of the folder is run. `auto` is another auto class
    to load with. Raises ConfigError when a weight is missing, which transformers alone would make up at random (save
    one that begins as in `may_lack`), and when the weights have layers that the config has not, which it would leave
    out.
    """
    from transformers import PreTrainedModel

    folder = local_folder(spec.path)
    check_weights(folder)
    config = load_config(str(folder))
    if str(dtype).endswith("float32"):
        unpack_on_the_way_in(config)
    with refusals_named(spec.path, "model.path"), quiet_progress():
        loaded: Any = (auto or auto_class(config)).from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            attn_implementation=attention_of(spec.attention, config, auto),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **quantized(spec),
        )
    model, report = loaded
    _refuse_other_sizes(report["mismatched_keys"], spec.path)
    _refuse_layers_beyond(model, report["unexpected_keys"], spec.path)
    if missing := sorted(key for key in report["missing_keys"] if not key.startswith(may_lack)):
        raise ConfigError(
            f"lacks {len(missing)} weights of {type(model).__name__}, among them {missing[0]}",
            path="model.path",
            value=spec.path,
            fix="copy the whole folder again",
        )
    _without_cache(model)
    assert isinstance(model, PreTrainedModel)
    return model


def shape_model(spec: ModelSpec, *, dtype: torch.dtype) -> PreTrainedModel:
    """The model that `load_model` gives, its parameters shapes without values; buffers are real. Reads no weights."""
    from accelerate import init_empty_weights
    from transformers import PreTrainedModel

    folder = local_folder(spec.path, weights=False)
    config = load_config(str(folder))
    attention = attention_of(spec.attention, config)
    with refusals_named(spec.path, "model.path"), init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()  # each name got a parameter of its own
    _without_cache(model)
    assert isinstance(model, PreTrainedModel)
    return model


def _without_cache(model: PreTrainedModel) -> None:
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = False


def attention_of(asked: str, config: PretrainedConfig, auto: Any = None) -> str:
    """The attention implementation to load with: `eager` where the default, sdpa, is none of the architecture's.

    Any other choice is kept, so that transformers refuses one that cannot be.
    """
    default: str = ModelSpec.model_fields["attention"].default
    model_class = (auto or auto_class(config))._model_mapping.get(type(config), None)
    return "eager" if asked == default and getattr(model_class, "_supports_sdpa", True) is False else asked


def _refuse_other_sizes(mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]], path: str) -> None:
    for name, stored, wanted in sorted(mismatched):
        raise ConfigError(
            f"has weights of other sizes than its config.json says: {name} is {list(stored)}, not {list(wanted)}",
            path="model.path",
            value=path,
            fix="use the config.json that belongs to the weights",
        )


def _refuse_layers_beyond(model: PreTrainedModel, unexpected: Iterable[str], path: str) -> None:
    """Raises ConfigError for weights that would have a place if the config had more layers.

    Other weights without a place are another task's head or old buffers, and no part of this model.
    """
    depth: dict[str, int] = {}
    for stack, index in filter(None, map(_place, model.state_dict())):
        depth[stack] = max(depth.get(stack, 0), index)
    extra = int(getattr(model.config, "num_nextn_predict_layers", 0) or 0)  # stored behind the others, never built
    places = ((key, _place(key)) for key in sorted(unexpected))
    beyond = [key for key, at in places if at and at[0] in depth and at[1] > depth[at[0]] + extra]
    if beyond:
        raise ConfigError(
            f"has weights of more layers than its config.json says, among them {beyond[0]}",
            path="model.path",
            value=path,
            fix="use the config.json that belongs to the weights",
        )


def _place(key: str) -> tuple[str, int] | None:
    """`("model.layers", 3)` of a weight in the fourth layer; None for a weight outside any list of layers."""
    found = _LAYER.match(key)
    return (found[1], int(found[2])) if found else None


@contextmanager
def refusals_named(path: str, field: str) -> Iterator[None]:
    """Turns what transformers raises for a folder it cannot load into a ConfigError with its first line."""
    from huggingface_hub.errors import StrictDataclassError

    refusals = (OSError, ValueError, TypeError, AttributeError, ImportError, LookupError, RuntimeError, ArithmeticError)
    try:
        yield
    except (*refusals, StrictDataclassError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # A strict config says in the second line what is wrong with the field that the first one names.
        reason = " ".join(line.strip() for line in lines[: 2 if isinstance(error, StrictDataclassError) else 1])
        raise ConfigError(
            f"cannot be loaded: {reason}", path=field, value=path, fix="use a model transformers knows"
        ) from error
