"""From a model path in a job to config, tokenizer and model: a local Hugging Face folder, or a hub id.

Knows which files make a usable folder and how a hub id becomes one (cached, `org/name@revision`). Does not know
adapters, devices or sharding. torch and transformers are imported inside the functions that need them, so that
`check_folder` is cheap enough for the driver to call before it starts a cluster.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from rayswift.config.job import ModelSpec

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


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
    name, revision = split_id(path)
    if os.path.exists(path):
        raise ConfigError("is a file, not a Hugging Face folder", path=field, value=path, fix="name its folder")
    if not _HUB_ID.fullmatch(name):
        raise ConfigError(
            "is not a folder", path=field, value=path, fix="check the path; `rayswift model init` makes one"
        )
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


def check_folder(path: str, *, chat_template: bool = False, field: str = "model.path") -> dict[str, Any]:
    """The parsed config.json of a model that has config, weights, tokenizer and, if asked for, a chat template.

    Reads names and headers only, no tensor data. Of a hub id only the small files are fetched and checked. Raises
    ConfigError with the folder, what is missing or broken, and the fix.
    """
    remote = not os.path.isdir(path)
    folder = local_folder(path, weights=False, field=field)
    config = read_json(folder / "config.json", field=field)
    if "model_type" not in config:
        raise ConfigError(
            "has a config.json without model_type", path=field, value=path, fix="use a transformers model"
        )
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


def check_tokenizer(folder: Path, *, field: str = "model.path") -> None:
    """Raises ConfigError when no tokenizer could be loaded from the folder."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(
            "has no tokenizer: tokenizer.json is missing",
            path=field,
            value=str(folder),
            fix="copy the tokenizer files of the model into the folder",
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).exists():
            read_json(folder / name, field=field)


def has_chat_template(folder: Path) -> bool:
    """Whether a tokenizer loaded from the folder will have a chat template."""
    if any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(read_json(config, field="model.path").get("chat_template"))


def check_weights(folder: Path, *, field: str = "model.path") -> None:
    """Raises ConfigError when a safetensors file is missing or not as long as its header says."""
    for name in weight_files(folder, field=field):
        file = folder / name
        if not file.is_file():
            raise ConfigError(f"lacks {name}, which {INDEX} names", path=field, value=str(folder), fix="copy it again")
        if (reason := _broken(file)) is not None:
            raise ConfigError(f"has a broken {name}: {reason}", path=field, value=str(folder), fix="copy it again")


def weight_files(folder: Path, *, field: str = "model.path") -> list[str]:
    """The sorted names of the folder's safetensors files, by its index if it has one. ConfigError if it has none."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX, field=field).get("weight_map")
        if isinstance(weight_map, Mapping) and weight_map:
            return sorted({str(name) for name in weight_map.values()})
    elif (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    pickled = any(folder.glob("*.bin"))
    raise ConfigError(
        "has its weights only as pickles, which can run code" if pickled else f"has no weights: {WEIGHTS} is missing",
        path=field,
        value=str(folder),
        fix="convert them to safetensors" if pickled else "copy the weights into the folder",
    )


def _broken(file: Path) -> str | None:
    """Why a safetensors file cannot be whole, judged by its header and its length; None when it can."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            return f"it ends after {size} bytes, inside its header"
        try:
            header = json.loads(stream.read(length))
            end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            return "its header is not that of a safetensors file"
    expected = 8 + length + end
    return None if expected == size else f"it has {size} bytes of {expected}"


def read_json(file: Path, *, field: str) -> dict[str, Any]:
    """The object in a JSON file of a model folder. ConfigError when missing or not a JSON object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"has no {file.name}", path=field, value=str(file.parent), fix="give an ordinary Hugging Face folder"
        ) from error
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"has a {file.name} that cannot be read: {error}", path=field, value=str(file.parent), fix="copy it again"
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(f"has a {file.name} that is not a JSON object", path=field, value=str(file.parent))
    return value


def load_config(path: str, *, field: str = "model.path") -> PretrainedConfig:
    """The transformers config of a folder or hub id. Raises ConfigError for what transformers cannot build."""
    from transformers import AutoConfig, PretrainedConfig

    folder = local_folder(path, weights=False, field=field)
    read_json(folder / "config.json", field=field)
    with _refusals_named(path, field):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    assert isinstance(config, PretrainedConfig)
    return config


def load_tokenizer(path: str, *, field: str = "model.path") -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id. Raises ConfigError when the folder has none."""
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    folder = local_folder(path, weights=False, field=field)
    check_tokenizer(folder, field=field)
    with _refusals_named(path, field):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def load_model(spec: ModelSpec, *, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
    """The causal language model of `spec`, on the CPU in `dtype` (None: as stored), with `use_cache` off.

    With a cache the packed documents of a sequence would see each other. Only safetensors are read and no code of the
    folder is run. Raises ConfigError when a weight is missing: transformers alone would make it up at random.
    """
    from transformers import AutoModelForCausalLM, PreTrainedModel

    folder = local_folder(spec.path)
    check_weights(folder)
    config = load_config(str(folder))
    with _refusals_named(spec.path, "model.path"), quiet_progress():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            attn_implementation=spec.attention,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"lacks {len(missing)} weights of {type(model).__name__}, among them {missing[0]}",
            path="model.path",
            value=spec.path,
            fix="copy the whole folder again",
        )
    model.config.use_cache = False
    assert isinstance(model, PreTrainedModel)
    return model


@contextmanager
def _refusals_named(path: str, field: str) -> Iterator[None]:
    """Turns what transformers raises for a folder it cannot load into a ConfigError with its first line."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"cannot be loaded: {reason}", path=field, value=path, fix="use a model transformers knows"
        ) from error


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Silences the progress bars of transformers and the hub: RaySwift shows its own."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    shown, hub_shown = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        if hub_shown:
            enable_progress_bars()
