"""Makes a base model from nothing: random weights, a tokenizer, a chat template, as an ordinary Hugging Face folder.

Knows the order in which such a folder is made. What a size is called lies in `models/shapes.py`, how a tokenizer is
trained in `models/tokenizer.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift.errors import ConfigError
from rayswift.models.auto import auto_class
from rayswift.models.loading import load_config, load_tokenizer
from rayswift.models.quiet import quiet_progress
from rayswift.models.shapes import Sizes, build_config, config_class, field_of
from rayswift.models.staging import is_empty_folder, staged_folder
from rayswift.models.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_ARCH, DEFAULT_MAX_LENGTH, DEFAULT_VOCAB_SIZE = "qwen3", 2048, 4096
_DERIVED = ("architectures", "transformers_version", "dtype", "torch_dtype", "quantization_config", "_name_or_path")


@dataclass(frozen=True)
class InitReport:
    """What was made. `vocab_size` counts embedding rows, `tokenizer_vocab_size` the ids text can turn into."""

    directory: str
    arch: str
    num_params: int
    vocab_size: int
    tokenizer_vocab_size: int
    notes: tuple[str, ...] = ()


def init_model(
    directory: str | os.PathLike[str],
    *,
    arch: str | None = None,
    layers: int | None = None,
    hidden_size: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    intermediate_size: int | None = None,
    vocab_size: int | None = None,
    max_length: int | None = None,
    tie_embeddings: bool | None = None,
    train_tokenizer_files: Sequence[str | os.PathLike[str]] = (),
    like: str | None = None,
    seed: int = 0,
    dtype: str = "float32",
    extra: Mapping[str, Any] | None = None,
) -> InitReport:
    """A report on the folder that was made at `directory`: the same weights for the same arguments.

    `like` is a model (folder or hub id) whose config is the starting point and whose tokenizer is taken when there is
    no file to train one on. Without `like` the default is a qwen3 with tied embeddings. `extra` are further fields of
    the config. Raises ConfigError for anything that cannot be made, and then leaves nothing behind.
    """
    check_free(directory)
    start = _config_of(like, arch)
    arch = arch or (str(start["model_type"]) if start else DEFAULT_ARCH)
    sizes = Sizes(layers, hidden_size, heads, kv_heads, intermediate_size, max_length, vocab_size, tie_embeddings)
    sizes = sizes if start else _with_defaults(sizes, arch)
    config = build_config(arch, sizes, like=start, extra=extra)
    tokenizer = _tokenizer(train_tokenizer_files, like, config)
    _check_fits(tokenizer, config)
    _bind(config, tokenizer)
    model = random_model(config, seed=seed, dtype=dtype)
    _write(directory, model, tokenizer)
    return InitReport(
        directory=str(directory),
        arch=arch,
        num_params=sum(p.numel() for p in model.parameters()),
        vocab_size=int(config.vocab_size),
        tokenizer_vocab_size=len(tokenizer),
        notes=_notes(tokenizer, config),
    )


def random_model(config: PretrainedConfig, *, seed: int, dtype: str = "float32") -> PreTrainedModel:
    """A model with weights drawn in float32 from `seed`, then rounded to `dtype`. torch's own generator is untouched.

    Raises ConfigError for a config whose model cannot be built or cannot run.
    """
    import torch
    from transformers import PreTrainedModel

    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = auto_class(config).from_config(config, dtype=torch.float32)
        assert isinstance(model, PreTrainedModel)
        with torch.no_grad():  # sizes that clash, such as more experts per token than experts, only show when it runs
            ids_BT = torch.arange(min(8, config.get_text_config().vocab_size))[None]
            model.eval()(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False)
    except (ValueError, TypeError, AttributeError, RuntimeError, ImportError, LookupError, ArithmeticError) as error:
        raise ConfigError(
            f"cannot be built with these sizes: {error}", path="--arch", value=config.model_type, fix="change the sizes"
        ) from error
    torch.nn.Module.to(model, getattr(torch, dtype))
    return model


def check_free(directory: str | os.PathLike[str]) -> None:
    """Raises ConfigError for a place that holds something."""
    if os.path.lexists(directory) and not is_empty_folder(directory):
        raise ConfigError(
            "exists and is not an empty folder", path="DIR", value=str(directory), fix="name a new folder or remove it"
        )


def _config_of(like: str | None, arch: str | None) -> dict[str, Any] | None:
    """The fields of another model's config, without what its own weights gave it."""
    if like is None:
        return None
    config = load_config(like, field="--like")
    if arch is not None and arch != config.model_type:
        raise ConfigError(
            f"is not the architecture of --like={like}",
            path="--arch",
            value=arch,
            fix=f"use {config.model_type} or leave it out",
        )
    return {key: value for key, value in config.to_dict().items() if key not in _DERIVED}


def _with_defaults(sizes: Sizes, arch: str) -> Sizes:
    """Sizes of a model that a laptop trains in minutes, where none are given. Heads are 32 wide."""
    hidden_size = 128 if sizes.hidden_size is None else sizes.hidden_size
    heads = max(1, hidden_size // 32) if field_of(config_class(arch), "heads") else None  # mamba has none
    return Sizes(
        layers=4 if sizes.layers is None else sizes.layers,
        hidden_size=hidden_size,
        heads=heads if sizes.heads is None else sizes.heads,
        kv_heads=sizes.kv_heads,
        intermediate_size=sizes.intermediate_size,
        max_length=DEFAULT_MAX_LENGTH if sizes.max_length is None else sizes.max_length,
        vocab_size=DEFAULT_VOCAB_SIZE if sizes.vocab_size is None else sizes.vocab_size,
        tie_embeddings=True if sizes.tie_embeddings is None else sizes.tie_embeddings,
    )


def _tokenizer(
    files: Sequence[str | os.PathLike[str]], like: str | None, config: PretrainedConfig
) -> PreTrainedTokenizerBase:
    if files:
        length = next((v for k in ("max_position_embeddings", "n_positions") if (v := getattr(config, k, None))), None)
        return train_tokenizer(files, vocab_size=config.vocab_size, max_length=length or DEFAULT_MAX_LENGTH)
    if like is None:
        raise ConfigError(
            "is needed: a new model has no tokenizer", path="--train-tokenizer", fix="give text files, or --like MODEL"
        )
    return load_tokenizer(like, field="--like")


def _check_fits(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"is less than the {len(tokenizer)} tokens of the tokenizer",
            path="--vocab-size",
            value=config.vocab_size,
            fix=f"use {len(tokenizer)} or more, or train a tokenizer of that size",
        )


def _bind(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """The config names the special tokens of the tokenizer."""
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id


def generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Greedy decoding that ends at the end of a turn or of a document."""
    from transformers import GenerationConfig

    ends = [i for i in (tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=list(dict.fromkeys(ends)), pad_token_id=pad
    )


def _write(directory: str | os.PathLike[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model.generation_config = generation_config(tokenizer)
    try:
        with staged_folder(directory) as stage, quiet_progress():
            model.save_pretrained(stage)
            tokenizer.save_pretrained(stage)
    except OSError as error:
        raise ConfigError(
            f"cannot be written: {error.strerror or error}",
            path="DIR",
            value=str(Path(directory)),
            fix="name another place",
        ) from error


def _notes(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> tuple[str, ...]:
    spare = config.vocab_size - len(tokenizer)
    if spare <= 0:
        return ()
    return (
        f"the tokenizer has {len(tokenizer)} of {config.vocab_size} tokens; {spare} embedding rows are padding "
        "that no text uses",
    )
