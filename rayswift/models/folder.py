"""What an ordinary Hugging Face folder holds, read by names and headers: config, tokenizer, template, weights.

Loads neither torch nor transformers, and no tensor. Knows no hub and no job.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rayswift.errors import ConfigError

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_VOCABULARIES = ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model")
"""What most tokenizers read only where there is no tokenizer.json."""
_RENDERING = (
    *("tokenizer.json", "tokenizer.[0-9]*.[0-9]*.[0-9]*.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "tekken.json", *_VOCABULARIES),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)
"""What decides which ids and features a row becomes, by the names that are read and that are fetched from a hub.

Files of other tools and copies beside them are none of it.
"""
_OF_LOADING = ("is_local", "local_files_only", "name_or_path", "transformers_version")
"""What transformers notes in a tokenizer_config.json of how it was loaded, when it is saved again."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


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


def processors_template(folder: Path) -> str | None:
    """The chat template that a processor was saved with in a file of its own; None where there is none."""
    file = folder / "chat_template.json"
    found = read_json(file, field="model.path").get("chat_template") if file.is_file() else None
    return found if isinstance(found, str) else None


def rendering_sha256(folder: Path) -> dict[str, str]:
    """The sha256 (hex) of each file that rows are rendered with, by its path in the folder.

    Of JSON it is that of what the file says, however it is laid out. Of files and not of the tokenizer that is made of
    them: how that is written down differs between versions of its library.
    """
    files = {file.relative_to(folder).as_posix(): file for one in _RENDERING for file in folder.glob(one)}
    return {name: hashlib.sha256(_said(files[name])).hexdigest() for name in sorted(files) if files[name].is_file()}


def _said(file: Path) -> bytes:
    content = file.read_bytes()
    try:
        said = json.loads(content) if file.suffix == ".json" else None
    except (ValueError, RecursionError):
        return content
    if not isinstance(said, dict):
        return content
    return json.dumps({key: said[key] for key in said if key not in _OF_LOADING}, sort_keys=True).encode()


def rendered_otherwise(before: Mapping[str, str] | None, folder: Path) -> list[str]:
    """The names of files that rows are rendered with now and that are not as they were `before`; none if unknown.

    A vocabulary beside a tokenizer.json may come or go; one that changes is named, for a few tokenizers read it there.
    """
    if before is None:
        return []
    then = {name: before[name] for name in before if any(fnmatchcase(name, one) for one in _RENDERING)}
    now = rendering_sha256(folder)
    may_lack = _VOCABULARIES if "tokenizer.json" in then.keys() & now.keys() else ()
    differing = {name for name in then.keys() | now.keys() if then.get(name) != now.get(name)}
    return sorted(name for name in differing if name not in may_lack or name in then.keys() & now.keys())


def check_weights(folder: Path, *, field: str = "model.path") -> None:
    """Raises ConfigError when a safetensors file is missing or not as long as its header says."""
    for name in weight_files(folder, field=field):
        file = folder / name
        if not file.is_file():
            raise ConfigError(f"lacks {name}, which {INDEX} names", path=field, value=str(folder), fix="copy it again")
        if (reason := broken(file)) is not None:
            raise ConfigError(f"has a broken {name}: {reason}", path=field, value=str(folder), fix="copy it again")


def weight_files(folder: Path, *, field: str = "model.path") -> list[str]:
    """The sorted names of the folder's safetensors files, by its index if it has one. ConfigError if it has none."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX, field=field).get("weight_map")
        if isinstance(weight_map, Mapping) and weight_map:
            return sorted({_safe(str(name), folder, field) for name in weight_map.values()})
    elif (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    pickled = any(file.suffix in PICKLES for file in folder.iterdir())
    raise ConfigError(
        "has its weights only as pickles, which can run code" if pickled else f"has no weights: {WEIGHTS} is missing",
        path=field,
        value=str(folder),
        fix="convert them to safetensors" if pickled else "copy the weights into the folder",
    )


def stored_dtype(folder: Path, *, field: str = "model.path") -> str | None:
    """The type, as torch calls it, that most weights are stored in; None where that is none a model computes in."""
    counts: Counter[str] = Counter()
    for name in weight_files(folder, field=field):
        header = read_header(folder / name)
        counts.update(value["dtype"] for key, value in header.items() if key != "__metadata__")
    return _DTYPES.get(counts.most_common(1)[0][0]) if counts else None


def packing_of(folder: Path, *, field: str = "model.path") -> str | None:
    """How the weights are packed, as transformers calls it: `mxfp4`, `fp8`, `compressed-tensors`; None if they are not.

    Raises ConfigError as `read_json`.
    """
    return _packing(read_json(folder / "config.json", field=field))


def _packing(config: Mapping[str, Any]) -> str | None:
    said = config.get("quantization_config")
    return None if not isinstance(said, dict) else str(said.get("quant_method") or "unknown")


def check_unpacked(config: Mapping[str, Any], path: str, *, field: str = "model.path") -> None:
    """Raises ConfigError for a config.json of weights that bitsandbytes has packed: no model of them can be written."""
    said = config.get("quantization_config")
    if _packing(config) == "bitsandbytes" or (isinstance(said, dict) and said.get("load_in_4bit")):
        raise ConfigError(
            "has its weights packed by bitsandbytes, and what is trained on them cannot be written as a model",
            path=field,
            value=path,
            fix="use the unquantized base with model.quantization: nf4",
        )


def read_header(file: Path) -> dict[str, Any]:
    """What a safetensors file says of each tensor by its name: dtype, shape and place; `__metadata__` beside them."""
    with open(file, "rb") as stream:
        header: dict[str, Any] = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    return header


def _safe(name: str, folder: Path, field: str) -> str:
    """The name of a file of weights. Raises ConfigError for one that is no safetensors file of the folder."""
    if not name.endswith(".safetensors"):
        rule, fix = f"names {name[:80]} in its {INDEX}: pickles can run code", "convert it to safetensors"
    elif Path(name).is_absolute() or ".." in Path(name).parts:
        rule, fix = f"names {name[:80]} in its {INDEX}, which is not in the folder", "copy the whole folder again"
    else:
        return name
    raise ConfigError(rule, path=field, value=str(folder), fix=fix)


def broken(file: Path) -> str | None:
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
    value = parsed(file, field=field)
    if not isinstance(value, dict):
        raise ConfigError(f"has a {file.name} that is not a JSON object", path=field, value=str(file.parent))
    return value


def parsed(file: Path, *, field: str) -> Any:
    """What is in a JSON file of a model folder. ConfigError when missing or not JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"has no {file.name}", path=field, value=str(file.parent), fix="give an ordinary Hugging Face folder"
        ) from error
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(
            f"has a {file.name} that cannot be read: {error}", path=field, value=str(file.parent), fix="copy it again"
        ) from error
